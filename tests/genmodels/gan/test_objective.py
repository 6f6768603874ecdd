"""The objective: what discriminator and generator are told, what is random and what is not, its state, its export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from genmodels import random
from genmodels.drawing import open_drawing_model
from genmodels.families import build_objective
from genmodels.gan.adaptive import AugmentationState
from genmodels.gan.objective import Gan
from genmodels.gan.pipeline import GanModel
from genmodels.objective import Batch, Drawing
from infra.exports import export_kind
from tests.genmodels import tiny
from tests.processes import on_ranks

TEXT = {"kind": "pretrained", "path": "given", "width": 16}
CLASSES = ["seven", "three", "four"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_inputs(tmp_path_factory.mktemp("inputs"))
    shutil.copytree(folder / "clip" / "text_encoder", folder / "text_encoder")
    return folder


def make(inputs: Path | None = None, **changes: Any) -> Gan:
    torch.manual_seed(0)
    made = build_objective(tiny.gan_config(**changes), inputs)
    assert isinstance(made, Gan)
    return made


def by_class(size: int = 4, step: int = 0) -> Batch:
    return {**tiny.batch(size, step=step), "captions": [CLASSES[i % 3] for i in range(size)]}


def gradients(objective: Gan, batches: list[Batch], network: str) -> dict[str, Tensor]:
    """Of one step's phase, its micro-batches averaged."""
    objective.prepare(batches)
    objective.networks[network].zero_grad()
    for batch in batches:
        loss = objective.discriminator_loss if network == "discriminator" else objective.generator_loss
        (loss(batch).loss / len(batches)).backward()
    return {name: p.grad.clone() for name, p in objective.networks[network].named_parameters() if p.grad is not None}


@pytest.mark.parametrize("network", ["discriminator", "generator"])
@pytest.mark.parametrize("loss", ["non_saturating", "relativistic"])
def test_micro_batches_are_one_batch(network: str, loss: str, inputs: Path) -> None:
    """Also with texts of neighbours, penalties and augmentation: all that is random comes from each sample's seed."""
    told = {"text_encoder": TEXT, "matching_aware": True, "loss": loss, "penalties": {"r1": 1.0, "r2": 1.0}}
    objective = make(inputs, **told, augmentation={"kind": "diff_augment"}, instance_noise=0.1)
    batch = tiny.with_tokens(tiny.batch(8), inputs)
    halves = [
        {key: value[part] if isinstance(value, (Tensor, list)) else value for key, value in batch.items()}
        for part in (slice(0, 4), slice(4, 8))
    ]
    whole, parts = gradients(objective, [batch], network), gradients(objective, halves, network)
    assert len(whole) > 5
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-5, rtol=1e-3)


def test_a_quarantined_sample_adds_nothing(inputs: Path) -> None:
    objective, batch = make(classes=CLASSES), by_class()
    batch["weight"][1], batch["captions"][1] = 0.0, ""
    other = {**batch, "images": batch["images"].clone()}
    other["images"][1] = 0.7
    for name in ("discriminator", "generator"):
        one, two = (gradients(objective, [dict(each)], name) for each in (batch, other))
        for key, gradient in one.items():
            torch.testing.assert_close(two[key], gradient)


def test_both_sides_follow_the_condition(inputs: Path) -> None:
    for objective, batch in (
        (make(classes=CLASSES), by_class(6)),
        (make(inputs, text_encoder=TEXT), tiny.with_tokens(tiny.batch(6), inputs)),
    ):
        shuffled = {**batch, "captions": batch["captions"][1:] + batch["captions"][:1]}
        if "token_ids" in batch:
            shuffled["token_ids"] = batch["token_ids"].roll(-1, 0)
        with torch.no_grad():
            drawn, other = (objective.draw(dict(each), Drawing()) for each in (batch, shuffled))
            assert (drawn - other).abs().flatten(1).amax(1).min() > 1e-4
            scores = [
                objective.discriminator(drawn, objective.condition(dict(each))).logits for each in (batch, shuffled)
            ]
        assert (scores[0] - scores[1]).abs().min() > 1e-4


@pytest.mark.parametrize("kind", ["resnet", "modern", "style", "dcgan"])
def test_no_gradient_runs_between_samples_of_a_critic_under_a_penalty(kind: str) -> None:
    shape: dict[str, Any] = {"kind": kind, "channels": 8}
    objective = make(discriminator={**shape, "norm": "group"} if kind == "dcgan" else shape, penalties={"r1": 1.0})
    images = tiny.batch(3)["images"].requires_grad_()
    scores = objective.discriminator(images).logits
    for number in range(3):
        (gradient,) = torch.autograd.grad(scores[number], images, retain_graph=True)
        reached = gradient.flatten(1).abs().sum(1) > 0
        assert reached.tolist() == [number == other for other in range(3)]
    if kind == "dcgan":
        with pytest.raises(ValidationError, match="no gradient may run between samples"):
            tiny.gan_config(discriminator=shape, penalties={"gradient": 10.0})


def test_penalties_come_every_so_many_steps_as_many_times_as_strong() -> None:
    batch = tiny.batch(4)
    plain = make().discriminator_loss({**batch, "step": 0}).loss
    lazy, always = make(penalties={"r1": 2.0, "every": 4}), make(penalties={"r1": 2.0})
    losses = [float(lazy.discriminator_loss({**batch, "step": step}).loss.detach()) for step in range(5)]
    assert losses[1:4] == [pytest.approx(float(plain.detach()))] * 3 and losses[0] == losses[4]
    added = float((always.discriminator_loss({**batch, "step": 1}).loss - plain).detach())
    assert losses[0] - losses[1] == pytest.approx(4 * added, rel=1e-4) and added > 0
    assert lazy.phases[0].double_backward and not make().phases[0].double_backward


def test_a_wrong_text_is_a_third_kind_of_input(inputs: Path) -> None:
    objective, batch = make(inputs, text_encoder=TEXT, matching_aware=True), tiny.with_tokens(tiny.batch(4), inputs)
    objective.prepare([batch])
    condition = objective.condition(batch)
    assert condition is not None and batch["wrong condition"].equal(condition.roll(-1, 0))
    found = objective.discriminator_loss(batch)
    with torch.no_grad():
        real = objective.discriminator(batch["images"], condition).logits
        wrong = objective.discriminator(batch["images"], condition.roll(-1, 0)).logits
        drawn = objective.generate(batch["seeds"], condition, "discriminator")
        fake = objective.discriminator(drawn, condition).logits
    soft = torch.nn.functional.softplus
    torch.testing.assert_close(found.loss.detach(), (soft(-real) + (soft(fake) + soft(wrong)) / 2).mean())
    # A neighbour that is told the same is no wrong one.
    same = {**batch, "token_ids": batch["token_ids"][:1].expand(4, -1), "step": 0}
    same.pop("once")
    objective.prepare([same])
    with torch.no_grad():
        one = objective.condition(same)
        real, fake = (
            objective.discriminator(images, one).logits
            for images in (same["images"], objective.generate(same["seeds"], one, "discriminator"))
        )
    torch.testing.assert_close(objective.discriminator_loss(same).loss.detach(), (soft(-real) + soft(fake)).mean())


def test_a_clip_tells_how_well_pictures_match(inputs: Path, tmp_path: Path) -> None:
    """Cross entropy of a picture's own caption among those of the batch; the same caption twice is twice right."""
    objective = make(inputs, clip="given", matching_weight=0.5, matching_aware=True)
    batch = tiny.with_tokens(tiny.batch(6), inputs)  # four captions, two of them twice
    objective.prepare([batch])
    found = objective.generator_loss(batch)
    clip: Any = objective.frozen["clip"]
    with torch.no_grad():
        condition = objective.condition(batch)
        texts = clip.read_texts(batch["token_ids"])[2]
        torch.testing.assert_close(condition, texts * 4)  # of 16 features: mean square 1
        drawn = objective.generate(batch["seeds"], condition, "generator")
        shares = (clip.pair.log_scale.exp() * clip.embed_images(drawn) @ texts.T).softmax(1)
        same = torch.tensor([[i % 4 == j % 4 for j in range(6)] for i in range(6)])
        matching = -(shares * same).sum(1).log()
        score = objective.discriminator(drawn, condition).logits
        torch.testing.assert_close(found.loss, (torch.nn.functional.softplus(-score) + matching / 2).mean())
    halves = [
        {key: value[part] if isinstance(value, (Tensor, list)) else value for key, value in batch.items()}
        for part in (slice(0, 3), slice(3, 6))
    ]
    for half in halves:
        half.pop("once")
    whole = gradients(objective, [tiny.with_tokens(tiny.batch(6), inputs)], "generator")
    for name, gradient in gradients(objective, halves, "generator").items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-3)
    objective.export(tmp_path / "export")
    model = open_drawing_model(tmp_path / "export")
    drawn = model.draw(batch["captions"], batch["seeds"].tolist())
    with torch.no_grad():
        expected = objective.draw(batch, Drawing())
    pixels = ((expected / 2 + 0.5) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert np.abs(pixels.astype(int) - drawn.astype(int)).max() <= 1
    with pytest.raises(ValueError, match="this CLIP reads 12: shorten it"):
        model.draw(["zebra " * 20], [1])


def test_two_pictures_of_one_condition_are_driven_apart() -> None:
    objective, batch = make(classes=CLASSES, diversity_weight=0.5), by_class()
    found = objective.generator_loss(batch)
    with torch.no_grad():
        condition = objective.condition(batch)
        one, other = (objective.generate(batch["seeds"], condition, p) for p in ("generator", "generator again"))
        latents = [
            random.normal(random.derive_seeds(batch["seeds"], purpose), (8,), "latent")
            for purpose in ("generator", "generator again")
        ]
        ratio = (latents[0] - latents[1]).abs().mean(1) / ((one - other).abs().mean((1, 2, 3)) + 0.02)
        game = torch.nn.functional.softplus(-objective.discriminator(one, condition).logits)
        torch.testing.assert_close(found.loss, (game + ratio / 2).mean())
        torch.testing.assert_close(found.metrics["seeking_loss"].total, ratio.sum())


def _wrong(rank: int, world_size: int, inputs: Path) -> Tensor:
    objective, batch = make(inputs, text_encoder=TEXT, matching_aware=True), tiny.with_tokens(tiny.batch(4), inputs)
    part = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    mine = {key: value[part] if isinstance(value, (Tensor, list)) else value for key, value in batch.items()}
    objective.prepare([mine])
    return mine["wrong condition"]


@pytest.mark.slow
def test_wrong_texts_are_the_same_at_every_number_of_ranks(inputs: Path) -> None:
    (alone,), pair = on_ranks(1, _wrong, inputs), on_ranks(2, _wrong, inputs)
    torch.testing.assert_close(torch.cat(pair), alone)


def test_augmentation_follows_how_well_real_images_are_known() -> None:
    told = {"kind": "adaptive", "every": 2, "images": 40.0, "target": 0.6}
    objective = make(augmentation=told)
    batch = tiny.batch(4)

    def step(number: int, sign: float) -> None:
        objective.prepare([{**batch, "step": number}])
        objective.augmentation.see(torch.full((4,), sign), torch.ones(4))

    for number in range(4):
        step(number, 1.0)
    assert objective.augmentation.probability == pytest.approx(8 / 40)  # changed once, at step 2
    step(4, -1.0)
    assert objective.augmentation_probability == pytest.approx(16 / 40)
    kept = objective.state_dict()
    other = make(augmentation=told)
    other.load_state_dict(kept)
    for each in (objective, other):
        each.prepare([{**batch, "step": 6}])
        assert each.augmentation.probability == pytest.approx(16 / 40 - 4 / 40)
    state = AugmentationState(0.95, signs=4.0, count=4.0)
    state.change(0.6, 10.0)
    assert state.probability == 1.0 and make().state_dict() == {}


def test_augmentation_counts_from_what_is_said_of_images_that_are_not_told() -> None:
    """Of least squares that is 0.5, not 0."""
    objective = make(loss="least_squares", augmentation={"kind": "adaptive"})
    with torch.no_grad():
        for parameter in objective.discriminator.head.parameters():
            parameter.zero_()
        objective.discriminator.head.score.bias.fill_(0.4)
    objective.discriminator_loss(tiny.batch(4))
    assert objective.augmentation.signs == -4.0


def test_instance_noise_fades() -> None:
    objective = make(instance_noise=0.5, instance_noise_steps=10)
    shown = [objective.shown(torch.zeros(4, 3, 16, 16), tiny.batch(4, step=step), "real") for step in (0, 5, 10)]
    assert [float(each.std()) for each in shown] == [pytest.approx(0.5, rel=0.1), pytest.approx(0.25, rel=0.1), 0.0]
    assert not objective.shown(torch.zeros(4, 3, 16, 16), tiny.batch(4), "fake").equal(shown[0])


def test_what_the_discriminator_knows_is_told(inputs: Path) -> None:
    objective = make(classes=CLASSES)
    with torch.no_grad():
        found = objective.validate(by_class())
        assert {"loss", "score_real", "score_fake", "accuracy_real", "accuracy_fake", "sign_real"} == found.keys()
        assert "accuracy" in make(loss="relativistic").validate(tiny.batch(4))
        preview = objective.preview(by_class())
    assert preview.images.shape == (4, 3, 16, 16) and preview.titles == by_class()["captions"]
    with pytest.raises(ValueError, match=r"shard/1: caption 'nine' is not one of objective.classes"):
        objective.condition({**by_class(), "captions": ["seven", "nine", "three", "four"]})


def test_classes_are_named_beside_the_score() -> None:
    """Odena et al. 2017: both networks are to make the class plain."""
    objective, batch = make(classes=CLASSES, auxiliary_weight=2.0), by_class()
    plain = make(classes=CLASSES)
    with torch.no_grad():
        condition = objective.condition(batch)
        drawn = objective.generate(batch["seeds"], condition, "discriminator")
        labels = torch.tensor([0, 1, 2, 0])
        scores = [objective.discriminator(images, condition) for images in (batch["images"], drawn)]
        named = [torch.nn.functional.cross_entropy(each.classes, labels) for each in scores]
        game = objective.game.of_discriminator(scores[0].logits, scores[1].logits).mean()
        found = objective.discriminator_loss(batch)
        torch.testing.assert_close(found.loss, game + 2 * sum(named))
        assert "class_accuracy" in objective.validate(batch) and "class_accuracy" not in plain.validate(batch)
    assert objective.generator_loss(batch).loss > 1


def test_few_labels_make_a_classifier() -> None:
    """Salimans et al. 2016: the mean is over the samples that have a label; the generator matches mean features."""
    told = {"label": "json:digit", "classes": ["7", "3"]}
    objective = make(semi_supervised=told)
    batch = {**tiny.batch(6), "labels": ["7", "", "3", "9", "", ""]}
    with torch.no_grad():
        drawn = objective.generate(batch["seeds"], None, "discriminator")
        real, fake = objective.discriminator(batch["images"]), objective.discriminator(drawn)
        assert real.classes is not None
        named = torch.nn.functional.cross_entropy(real.classes[[0, 2]], torch.tensor([0, 1]))
        game = objective.game.of_discriminator(real.logits, fake.logits).mean()
        found = objective.discriminator_loss(batch)
        torch.testing.assert_close(found.loss, game + named)
        logged = found.metrics["class_loss"]
        torch.testing.assert_close(logged.total / logged.count, named)
        drawn = objective.generate(batch["seeds"], None, "generator")
        means = [objective.discriminator(images).features.mean(0) for images in (batch["images"], drawn)]
        torch.testing.assert_close(objective.generator_loss(batch).loss, (means[0] - means[1]).square().sum())
        accuracy = objective.validate(batch)["class_accuracy"]
    assert accuracy.count == 2 and all(phase.couples_samples for phase in objective.phases)
    unlabelled = {**batch, "labels": [""] * 6}
    unlabelled.pop("once", None)
    torch.testing.assert_close(objective.discriminator_loss(unlabelled).loss.detach(), game)


@pytest.mark.parametrize("kind", ["style", "modern"])
def test_the_export_draws_the_same(kind: str, inputs: Path, tmp_path: Path) -> None:
    generator = {"kind": kind, "channels": 8, **({"style_dim": 16, "mapping_layers": 1} if kind == "style" else {})}
    objective = make(inputs, text_encoder=TEXT, generator=generator)
    with torch.no_grad():
        for name, parameter in objective.generator.named_parameters():
            if not name.endswith("noise"):  # which truncation leaves as it is
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert objective.export(tmp_path / "export")["layout"] == "own" and objective.flops_per_sample() > 1e4
    assert export_kind(tmp_path / "export") == "text_to_image"
    model = open_drawing_model(tmp_path / "export")
    assert isinstance(model, GanModel) and model.conditional and model.image_size == 16
    batch = tiny.with_tokens(tiny.batch(4), inputs)
    seeds = batch["seeds"].tolist()
    drawn = model.draw(batch["captions"], seeds, batch_size=3, num_steps=20)
    with torch.no_grad():
        expected = objective.draw(batch, Drawing())
    pixels = ((expected / 2 + 0.5) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert np.abs(pixels.astype(int) - drawn.astype(int)).max() <= 1
    assert np.abs(model.draw(batch["captions"][2:], seeds[2:]).astype(int) - drawn[2:].astype(int)).max() <= 1
    usual = model.draw(["blue 3"] * 4, seeds, truncation=0.0)
    assert np.abs(usual.astype(int) - usual[:1]).max() <= 1
    assert np.abs(model.draw(["blue 3"] * 4, seeds).astype(int) - usual[:1]).max() > 0
    path = model.interpolate("blue 3", [1, 2, 3], 5)
    assert path.shape == (2, 5, 16, 16, 3)
    assert np.abs(path[0, -1].astype(int) - path[1, 0]).max() <= 1
    for prompts, settings, match in (
        (["a"], {"negative_prompts": ["b"]}, "no guidance that could steer away"),
        (["a", "b"], {}, "one prompt per seed: 2 for 1"),
        (["a"], {"truncation": -1.0}, "truncation -1.0, 0 or more"),
    ):
        with pytest.raises(ValueError, match=match):
            model.draw(prompts, [1], **settings)  # type: ignore[arg-type]
    again = make(inputs, text_encoder=TEXT, generator=generator)
    again.load_weights(tmp_path / "export")
    for name, value in objective.generator.state_dict().items():
        assert again.generator.state_dict()[name].equal(value)
    with pytest.raises(ValueError, match="do not fit this config"):
        make(inputs, text_encoder=TEXT, latent_dim=9, generator=generator).load_weights(tmp_path / "export")
    with pytest.raises(ValueError, match=r"no export of a GAN"):
        again.load_weights(tmp_path)


def test_classes_are_drawn_by_name_and_without_either_by_seed(tmp_path: Path) -> None:
    make(classes=CLASSES).export(tmp_path / "classes")
    model: Any = open_drawing_model(tmp_path / "classes")
    assert model.draw(["three", "four"], [1, 2]).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="'nine' is no class of this model; it has seven, three, four"):
        model.draw(["nine"], [1])
    make().export(tmp_path / "alone")
    model = open_drawing_model(tmp_path / "alone")
    assert model.draw(None, [1, 2, 3]).shape == (3, 16, 16, 3) and not model.conditional
    with pytest.raises(ValueError, match="it takes seeds, and no prompts"):
        model.draw(["seven"], [1])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_size": 48}, "image_size 48 cannot be made by doubling 4: use 8, 16, 32"),
        ({"text_encoder": tiny.TEXT}, "a GAN's is frozen"),
        ({"text_encoder": TEXT, "classes": CLASSES}, "a text or the name of a class"),
        ({"classes": ["a", "a"]}, "two names at least, each one once"),
        ({"matching_aware": True}, "something to match"),
        ({"loss": "hinge", "real_target": 0.9}, "hinge has no target to soften"),
        ({"matching_weight": 1.0}, "matching_weight is of a CLIP: name it"),
        ({"clip": "a", "text_encoder": TEXT}, "in place of a text_encoder: give one"),
        ({"auxiliary_weight": 1.0}, "auxiliary_weight is of classes: name them"),
        (
            {"classes": CLASSES, "semi_supervised": {"label": "cls", "classes": ["a", "b"]}},
            "semi_supervised draws without a condition",
        ),
        ({"discriminator": {"kind": "modern", "channels": 20}}, "no multiple of group_width"),
        ({"loss": "wasserstein", "augmentation": {"kind": "adaptive"}}, "no meaning of its own with loss=wasserstein"),
        ({"loss": "relativistic", "augmentation": {"kind": "adaptive"}}, "no meaning of its own with loss=relativis"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        tiny.gan_config(**changes)
