"""AttnGAN: the similarity against its equations word by word, what the words do to a picture, and the exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from genmodels.drawing import open_drawing_model
from genmodels.families import build_objective, objective_class
from genmodels.gan.attention.config import AttnGanConfig, DamsmConfig
from genmodels.gan.attention.damsm import Damsm
from genmodels.gan.attention.frozen import FrozenDamsm
from genmodels.gan.attention.matching import Features, Gammas, Matching, Texts, match, word_scores
from genmodels.gan.attention.networks import Pictures, divergence
from genmodels.gan.attention.objective import AttnGan
from genmodels.gan.attention.pipeline import AttnGanModel
from genmodels.objective import Batch, Drawing
from infra.exports import export_kind
from tests.genmodels import tiny
from tests.processes import on_ranks

GAMMAS = Gammas(4.0, 5.0, 10.0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_inputs(tmp_path_factory.mktemp("inputs"))
    tiny.write_damsm(folder / "damsm", folder)
    return folder


def make(inputs: Path, **changes: Any) -> AttnGan:
    torch.manual_seed(0)
    made = build_objective(tiny.attn_gan_config(**changes), inputs)
    assert isinstance(made, AttnGan)
    return made


def make_damsm(inputs: Path, **changes: Any) -> Damsm:
    torch.manual_seed(0)
    made = build_objective(tiny.damsm_config(**changes), inputs)
    assert isinstance(made, Damsm)
    return made


def told(inputs: Path, size: int = 4, **changes: Any) -> Batch:
    return tiny.with_tokens(tiny.batch(size, **changes), inputs)


def random_pairs(count: int = 3, length: int = 5, dim: int = 4, places: int = 6) -> tuple[Features, Texts]:
    draw = torch.Generator().manual_seed(1)
    regions, words = (
        torch.randn(count, *shape, generator=draw, dtype=torch.float64) for shape in ((dim, places), (length, dim))
    )
    image, sentence = (torch.randn(count, dim, generator=draw, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(length) < torch.tensor([length, 2, 3])[:count, None]
    return Features(regions, image), Texts(words, mask, sentence)


def by_the_equations(regions: Tensor, words: Tensor) -> float:
    """R(Q, D) of one image (dim, places) and one caption (words, dim), in plain loops."""
    length, places = len(words), regions.shape[1]
    similarity = [[float(words[i] @ regions[:, j]) for j in range(places)] for i in range(length)]  # eq. 7
    total = 0.0
    for i in range(length):
        normalised = [
            math.exp(similarity[i][j]) / sum(math.exp(similarity[k][j]) for k in range(length)) for j in range(places)
        ]  # eq. 8
        weights = [math.exp(GAMMAS.attention * value) for value in normalised]
        view = sum(weight / sum(weights) * regions[:, j] for j, weight in enumerate(weights))  # eq. 9
        assert isinstance(view, Tensor)
        relevance = float(view @ words[i] / (view.norm() * words[i].norm()))
        total += math.exp(GAMMAS.words * relevance)
    return math.log(total) / GAMMAS.words  # eq. 10


def test_words_match_as_in_the_equations() -> None:
    features, texts = random_pairs()
    found = word_scores(features.regions, texts, GAMMAS)
    for image in range(3):
        for caption in range(3):
            expected = by_the_equations(features.regions[image], texts.words[caption][texts.mask[caption]])
            assert float(found[image, caption]) == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_that_of_the_equations_in_both_directions() -> None:
    features, texts = random_pairs()
    scores = GAMMAS.batch * word_scores(features.regions, texts, GAMMAS)
    wholes = torch.nn.functional.cosine_similarity(features.image[:, None], texts.sentence, dim=2) * GAMMAS.batch
    found = match(features, texts, torch.arange(3)[:, None], torch.ones(3), GAMMAS)
    for each, value in ((scores, found.word_loss), (wholes, found.sentence_loss)):
        target = torch.arange(3)
        expected = [torch.nn.functional.cross_entropy(side, target, reduction="none") for side in (each, each.T)]
        torch.testing.assert_close(value, sum(expected).float(), atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    both = scores + wholes
    assert found.image_to_text.tolist() == (both.argmax(1) == torch.arange(3)).tolist()
    assert found.text_to_image.tolist() == (both.argmax(0) == torch.arange(3)).tolist()


def _apart(count: int, sharp: float) -> Matching:
    """Of pairs of which each has a direction of its own."""
    own = torch.eye(count)
    features = Features(own[:, :, None].expand(-1, -1, 4), own)
    texts = Texts(own[:, None].expand(-1, 3, -1), torch.ones(count, 3).bool(), own)
    return match(features, texts, torch.arange(count)[:, None], torch.ones(count), Gammas(5.0, 5.0, sharp))


def test_what_is_told_apart_costs_nothing_and_what_is_not_the_logarithm_of_the_batch() -> None:
    found = _apart(6, sharp=100.0)
    torch.testing.assert_close(found.loss, torch.zeros(6))
    assert found.image_to_text.sum() == found.text_to_image.sum() == 6
    usual = _apart(6, sharp=10.0)
    each = math.log(1 + 5 * math.exp(-10))  # cosines of 1 and of 0, so scores that differ by 1
    torch.testing.assert_close(usual.sentence_loss, torch.full((6,), 2 * each))
    torch.testing.assert_close(usual.word_loss, torch.full((6,), 2 * each))
    same = Features(torch.ones(6, 4, 2), torch.ones(6, 4))
    texts = Texts(torch.ones(6, 3, 4), torch.ones(6, 3).bool(), torch.ones(6, 4))
    found = match(same, texts, torch.arange(6)[:, None], torch.ones(6), GAMMAS)
    for value in (found.word_loss, found.sentence_loss):
        torch.testing.assert_close(value, torch.full((6,), 2 * math.log(6)))


def test_the_same_caption_is_no_wrong_one_and_quarantined_samples_are_none() -> None:
    features, texts = random_pairs()
    alone = [Features(*(v[:2] for v in features)), Texts(*(v[:2] for v in texts))]
    expected = match(*alone, torch.arange(2)[:, None], torch.ones(2), GAMMAS)  # type: ignore[arg-type]
    found = match(features, texts, torch.arange(3)[:, None], torch.tensor([1.0, 1.0, 0.0]), GAMMAS)
    torch.testing.assert_close(found.loss[:2], expected.loss)
    assert found.loss.isfinite().all()
    twins = match(features, texts, torch.tensor([[7], [7], [7]]), torch.ones(3), GAMMAS)
    torch.testing.assert_close(twins.loss, torch.zeros(3), atol=1e-5, rtol=0)


def test_padding_changes_nothing(inputs: Path) -> None:
    encoder, batch = make_damsm(inputs).encoders.of_texts, told(inputs)
    token_ids = batch["token_ids"]
    longer = torch.cat([token_ids, torch.full((4, 5), encoder.end)], dim=1)
    noisy = longer.clone()
    noisy[:, -4:] = torch.arange(4)
    short, *others = (encoder(each) for each in (token_ids, longer, noisy))
    for other in others:
        for one, two in ((short.words, other.words[:, :12]), (short.sentence, other.sentence)):
            torch.testing.assert_close(two, one)
        assert other.mask[:, :12].equal(short.mask) and not other.mask[:, 12:].any()
    assert short.mask.any(1).all() and not short.mask[:, 0].any() and encoder(longer[:, 0:1]).words.isfinite().all()
    words = [short.mask[i].sum() for i in range(4)]
    assert words == [(token_ids[i] != encoder.end).sum() for i in range(4)]  # the start is none, and the end is one
    alone = encoder(token_ids[2:3, : int(words[2]) + 1])  # without any padding
    torch.testing.assert_close(alone.sentence, short.sentence[2:3])
    torch.testing.assert_close(alone.words, short.words[2:3, : alone.words.shape[1]])


def test_a_sentence_is_what_both_directions_end_with(inputs: Path) -> None:
    """torch's own bidirectional LSTM over a packed caption says the same."""
    encoder, batch = make_damsm(inputs).encoders.of_texts, told(inputs)
    both = torch.nn.LSTM(8, 4, batch_first=True, bidirectional=True)
    for own, suffix in ((encoder.ahead, ""), (encoder.back, "_reverse")):
        both.load_state_dict(both.state_dict() | {f"{key}{suffix}": v for key, v in own.state_dict().items()})
    found = encoder(batch["token_ids"])
    lengths = found.mask.sum(1) + 1
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        encoder.embedding(batch["token_ids"]), lengths, batch_first=True, enforce_sorted=False
    )
    out, (last, _) = both(packed)
    expected = torch.nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=12)[0]
    torch.testing.assert_close(found.words * found.mask[..., None], expected * found.mask[..., None])
    torch.testing.assert_close(found.sentence, last.transpose(0, 1).flatten(1))


def _step(rank: int, world_size: int, inputs: Path, kind: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a rank's share of one global batch, averaged over ranks as the engines do."""
    objective: Any = make_damsm(inputs) if kind == "damsm" else make(inputs)
    batch = told(inputs, 8)
    batch["weight"][5] = 0.0
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    mine = {key: value[part] if isinstance(value, (Tensor, list)) else value for key, value in batch.items()}
    objective.prepare([mine])
    loss = objective.loss(mine).loss if kind == "damsm" else objective.generator_loss(mine).loss
    loss.backward()
    network = objective.networks["damsm" if kind == "damsm" else "generator"]
    values = {"loss": loss.detach()} | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    for value in values.values():
        torch.distributed.all_reduce(value)
    assert "wrong sentence" not in mine or mine["wrong sentence"].shape == (8 // world_size, 8)
    return {name: value / world_size for name, value in values.items()}  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["damsm", "attn_gan"])
def test_two_ranks_compare_as_one_does(kind: str, inputs: Path) -> None:
    (alone,), (one, other) = (on_ranks(world_size, _step, inputs, kind) for world_size in (1, 2))
    assert len(alone) > 8
    for name, value in alone.items():
        torch.testing.assert_close(one[name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other[name], one[name])


def test_a_damsm_learns_to_tell_pictures_apart(inputs: Path) -> None:
    objective, batch = make_damsm(inputs), told(inputs)
    batch["token_ids"][:, 1] = torch.arange(4) + 5  # four captions
    optimizer = torch.optim.Adam(objective.encoders.parameters(), 1e-2)
    first = objective.validate(batch)
    for _ in range(40):
        optimizer.zero_grad()
        objective.loss(batch).loss.backward()
        optimizer.step()
    last = objective.validate(batch)
    assert float(last["loss"].total) < 0.3 * float(first["loss"].total)
    for name in ("accuracy_image_to_text", "accuracy_text_to_image"):
        assert float(last[name].total) == 4
    assert objective.preview(batch).titles == batch["captions"]
    assert objective.flops_per_sample() > 0


def test_a_damsm_is_opened_as_it_was_exported(inputs: Path, tmp_path: Path) -> None:
    objective, batch = make_damsm(inputs), told(inputs)
    torch.nn.init.normal_(objective.encoders.of_images.whole.bias)
    assert objective.export(tmp_path / "one")["parameters"]["damsm"] > 1000
    frozen = FrozenDamsm.from_folder(tmp_path / "one")
    frozen.save(tmp_path / "two")
    again = FrozenDamsm.from_folder(tmp_path / "two")
    assert again.digest == frozen.digest and export_kind(tmp_path / "two") == "damsm"
    texts = again.read_texts(batch["token_ids"])
    found = again.match(batch["images"], texts, batch["token_ids"], batch["weight"])
    torch.testing.assert_close(found.loss, objective.matching(batch).loss)
    assert not any(p.requires_grad for p in again.parameters())
    assert all(p.requires_grad for p in objective.encoders.parameters())
    other = make_damsm(inputs)
    other.load_weights(tmp_path / "one")
    assert other.encoders.of_images.whole.bias.equal(objective.encoders.of_images.whole.bias)
    with pytest.raises(ValueError, match=r"holds no DAMSM \(no damsm.json there\)"):
        FrozenDamsm.from_folder(tmp_path)
    with pytest.raises(ValueError, match="is no export of a DAMSM"):
        other.load_weights(tmp_path)
    with pytest.raises(ValueError, match=r"has \d+ tokens, and this DAMSM reads 12: shorten it"):
        again.check_length(["a red seven on a white background, and more of it, and more"])


def draw(objective: AttnGan, batch: Batch) -> Pictures:
    with torch.no_grad():
        return objective.generate(batch["seeds"], objective.texts(batch), "drawing")


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_double(inputs: Path, stages: int) -> None:
    objective, batch = make(inputs, image_size=32, stages=stages), told(inputs, image_size=32)
    pictures = draw(objective, batch)
    sizes = [32 // 2**finer for finer in reversed(range(stages))]
    assert [each.shape for each in pictures.images] == [(4, 3, size, size) for size in sizes]
    assert [each.shape for each in objective.sizes_of(batch["images"])] == [(4, 3, size, size) for size in sizes]
    assert pictures.attention.shape == (4, 12, 16, 16) and pictures.mean.shape == pictures.log_variance.shape == (4, 6)
    assert all(each.abs().max() <= 1 for each in pictures.images)
    torch.testing.assert_close(pictures.attention.sum(1), torch.ones(4, 16, 16))
    mask = objective.texts(batch).mask
    assert not pictures.attention[~mask].any() and pictures.attention[mask].all()


def test_a_word_changes_the_picture_through_the_last_stage_too(inputs: Path) -> None:
    objective, batch = make(inputs), told(inputs)
    texts = objective.texts(batch)
    before = draw(objective, batch)
    words = texts.words.clone()
    words[0, 2] += 1.0  # the sentence stays
    with torch.no_grad():
        after = objective.generate(batch["seeds"], Texts(words, texts.mask, texts.sentence), "drawing")
    assert after.images[0].equal(before.images[0]) and not after.images[1][0].equal(before.images[1][0])
    assert not after.attention[0].equal(before.attention[0])
    torch.testing.assert_close(after.images[1][1:], before.images[1][1:])
    words = texts.words.clone()
    words[~texts.mask] = 9.0  # padding is none
    with torch.no_grad():
        after = objective.generate(batch["seeds"], Texts(words, texts.mask, texts.sentence), "drawing")
    torch.testing.assert_close(after.images[1], before.images[1])


def test_a_picture_does_not_depend_on_its_neighbours(inputs: Path) -> None:
    objective, batch = make(inputs), told(inputs)
    whole = draw(objective, batch).images[-1]
    for row in range(4):
        part = {key: value[row : row + 1] for key, value in batch.items() if isinstance(value, (Tensor, list))}
        torch.testing.assert_close(draw(objective, part).images[-1], whole[row : row + 1], atol=1e-5, rtol=1e-5)
    others = draw(objective, {**batch, "seeds": batch["seeds"] + 50, "once": {}}).images[-1]
    assert not others.equal(whole)


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    mean, log_variance = (torch.randn(3, 5, dtype=torch.float64) for _ in range(2))
    one = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), expected, atol=1e-12, rtol=1e-12)
    assert float(divergence(torch.zeros(1, 5), torch.zeros(1, 5))) == 0


def test_the_losses_are_the_papers(inputs: Path) -> None:
    objective, batch = make(inputs, damsm_weight=2.0, penalties={"r1": 3.0, "every": 2}), told(inputs)
    objective.prepare([batch])
    found = objective.discriminator_loss({**batch, "step": 1})
    softplus = torch.nn.functional.softplus
    texts = objective.texts(batch)
    wrong = texts.sentence.roll(-1, 0)
    drawn = objective.generate(batch["seeds"], texts, "discriminator").images
    real = objective.sizes_of(batch["images"])
    total = torch.zeros(4)
    for stage, judge in enumerate(objective.discriminator.stages):
        of_real, of_fake = judge(real[stage], texts.sentence, wrong), judge(drawn[stage], texts.sentence)
        alone = softplus(-of_real.alone) + softplus(of_fake.alone)
        against = (softplus(of_fake.told[0]) + softplus(of_real.told[1])) / 2
        total += (alone + softplus(-of_real.told[0]) + against) / 2
    torch.testing.assert_close(found.loss, total.mean())
    penalised = objective.discriminator_loss({**batch, "step": 2})
    penalty = penalised.metrics["penalty"]
    assert float(penalty.total) > 0 and "penalty" not in found.metrics
    torch.testing.assert_close(penalised.loss, total.mean() + 2 * penalty.total / 4)
    assert objective.phases[0].double_backward and objective.phases[1].couples_samples

    found = objective.generator_loss(batch)
    made = objective.generate(batch["seeds"], texts, "generator")
    scores = [judge(images, texts.sentence) for judge, images in zip(objective.discriminator.stages, made.images)]
    game = sum((softplus(-of.alone) + softplus(-of.told[0])) / 2 for of in scores)
    matched = objective.damsm.match(made.images[-1], texts, batch["token_ids"], batch["weight"]).loss
    expected = game + 0.1 * divergence(made.mean, made.log_variance) + 2 * matched
    torch.testing.assert_close(found.loss, expected.mean())
    found.loss.backward()
    assert all(p.grad is None for p in objective.damsm.parameters())
    assert all(p.grad is not None for p in objective.generator.parameters())


def test_at_indifference_the_discriminators_lose_two_logarithms_of_two_a_stage(inputs: Path) -> None:
    objective, batch = make(inputs), told(inputs)
    with torch.no_grad():
        for parameter in objective.discriminator.parameters():
            parameter.zero_()
    objective.prepare([batch])
    assert float(objective.discriminator_loss(batch).loss) == pytest.approx(2 * 2 * math.log(2))


def test_validation_previews_and_pictures(inputs: Path) -> None:
    objective, batch = make(inputs, preview_samples=3), told(inputs)
    with torch.no_grad():
        found = objective.validate(batch)
        preview = objective.preview(batch)
    assert {"loss", "damsm_loss", "caption_found", "told_real", "told_fake"} <= found.keys()
    assert preview.images.shape == (3, 3, 16, 16) and preview.titles == batch["captions"][:3]
    assert objective.draw(batch, Drawing()).shape == (4, 3, 16, 16) and objective.flops_per_sample() > 0


def test_an_export_draws_the_same_and_shows_what_each_word_is_for(inputs: Path, tmp_path: Path) -> None:
    objective, batch = make(inputs), told(inputs)
    objective.export(tmp_path / "export")
    assert export_kind(tmp_path / "export") == "text_to_image"
    model = open_drawing_model(tmp_path / "export")
    assert isinstance(model, AttnGanModel) and model.conditional and model.image_size == 16
    pictures = model.draw(batch["captions"], batch["seeds"].tolist(), batch_size=3)
    with torch.no_grad():
        expected = objective.draw(batch, Drawing())
    as_bytes = ((expected + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(pictures.astype(int) - as_bytes).max() <= 1
    words, maps = model.attention(tiny.CAPTIONS[0], 0)
    assert words[:3] == ["a", "red", "seven"] and words[-1] == "<|endoftext|>" and maps.shape == (len(words), 8, 8)
    np.testing.assert_allclose(maps.sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(maps, draw(objective, batch).attention[0, 1 : len(words) + 1], atol=1e-6)
    middle = model.draw(batch["captions"], [1, 2, 3, 4], truncation=0.0)
    assert (middle == model.draw(batch["captions"], [5, 6, 7, 8], truncation=0.0)).all()
    with pytest.raises(ValueError, match="no prompts"):
        model.draw(None, [1])
    other = make(inputs)
    torch.nn.init.normal_(other.generator.condition.weight)
    other.load_weights(tmp_path / "export")
    assert other.generator.condition.weight.equal(objective.generator.condition.weight)
    with pytest.raises(ValueError, match="is no export of a GAN"):
        other.load_weights(tmp_path)


def test_sizes_are_known_before_the_damsm_is(inputs: Path) -> None:
    for config, made in ((tiny.attn_gan_config(), make(inputs)), (tiny.damsm_config(), make_damsm(inputs))):
        estimated = objective_class(config.kind).abstract_networks(config)
        assert {name: [p.shape for p in network.parameters()] for name, network in estimated.items()} == {
            name: [p.shape for p in network.parameters()] for name, network in made.networks.items()
        }
    with pytest.raises(ValueError, match="needs damsm/ among its inputs"):
        build_objective(tiny.attn_gan_config())


@pytest.mark.parametrize("kind", ["damsm", "attn_gan", "attn_gan with a penalty"])
def test_bfloat16_is_close(kind: str, inputs: Path) -> None:
    penalties = {"penalties": {"r1": 1.0}} if kind.endswith("penalty") else {}
    objective: Any = make_damsm(inputs) if kind == "damsm" else make(inputs, **penalties)
    batch = told(inputs)
    objective.prepare([batch])
    for phase in objective.phases:
        exact = phase.loss(batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            read = {**batch, "once": {}}
            objective.prepare([read])
            rounded = phase.loss(read).loss
        assert float(rounded) == pytest.approx(float(exact), rel=0.05)
        rounded.backward()


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (AttnGanConfig, {"damsm": "x", "image_size": 32, "stages": 4}, "the first has to be 4 doubled, so use 64, 128"),
        (AttnGanConfig, {"damsm": "x", "image_size": 48}, "the first has to be 4 doubled"),
        (AttnGanConfig, {}, "damsm"),
        (DamsmConfig, {"image_size": 30}, "image_size 30 is no multiple of 8"),
        (
            DamsmConfig,
            {"image_encoder": {"channels": [8], "regions_after": 2}},
            "regions_after 2: there are 1 halvings",
        ),
        (DamsmConfig, {"image_encoder": {"channels": [9]}}, "is not a multiple of norm_groups 8"),
    ],
)
def test_what_cannot_be_is_refused(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config.model_validate(changes)
