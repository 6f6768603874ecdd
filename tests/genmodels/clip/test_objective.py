"""The contrastive objective: its loss against transformers', the same over ranks, and an export that others open."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from genmodels.clip.network import Embeddings
from genmodels.clip.objective import Clip, contrastive_loss, open_pair
from genmodels.families import build_objective
from genmodels.objective import Batch
from genmodels.text.tokenizer import encode
from tests.genmodels import tiny
from tests.processes import on_ranks


def make(inputs: Path) -> Clip:
    torch.manual_seed(0)
    made = build_objective(tiny.clip_config(), inputs)
    assert isinstance(made, Clip)
    return made


def given(inputs: Path, size: int = 8) -> Batch:
    return tiny.with_tokens(tiny.batch(size), inputs)


def part(batch: Batch, which: slice) -> Batch:
    return {key: value[which] if isinstance(value, (torch.Tensor, list)) else value for key, value in batch.items()}


def test_the_loss_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=1) for _ in range(2))
    ours = contrastive_loss(Embeddings(images, texts, torch.tensor(7.0)), torch.ones(6))
    torch.testing.assert_close(ours.mean(), image_text_contrastive_loss(7.0 * texts @ images.T))


def test_a_pair_of_weight_0_is_nobodys_negative(inputs: Path) -> None:
    objective, batch = make(inputs), given(inputs, 4)
    batch["weight"] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    with_bad = objective.loss(batch)
    kept = [0, 1, 3]
    without = objective.loss(
        {k: [v[i] for i in kept] if isinstance(v, list) else v[kept] for k, v in batch.items() if k != "step"}
    )
    torch.testing.assert_close(with_bad.loss, without.loss * 3 / 4)
    assert with_bad.metrics["loss"].count == 3


def _gradients(rank: int, world_size: int, inputs: Path) -> dict[str, Any]:
    """The gradients of one step, averaged over ranks as the engines do, and the loss that is logged."""
    torch.set_num_threads(1)
    objective, batch = make(inputs), given(inputs)
    batch["weight"][5] = 0.0
    share = 8 // world_size
    result = objective.loss(part(batch, slice(rank * share, (rank + 1) * share)))
    result.loss.backward()
    for parameter in objective.clip.parameters():
        if world_size > 1:
            torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= world_size
    gradients = {name: parameter.grad for name, parameter in objective.clip.named_parameters()}
    return {"gradients": gradients, "metrics": result.metrics}


def test_the_loss_of_pairs_that_are_all_alike_is_the_logarithm_of_their_number() -> None:
    same = torch.nn.functional.normalize(torch.ones(7, 5, dtype=torch.float64), dim=1)
    loss = contrastive_loss(Embeddings(same, same, torch.tensor(9.0, dtype=torch.float64)), torch.ones(7))
    torch.testing.assert_close(loss, torch.full((7,), math.log(7), dtype=torch.float64), rtol=0, atol=1e-9)


def _accumulated(rank: int, world_size: int, inputs: Path, micro_batches: int) -> dict[str, Any]:
    """As `_gradients`, in several micro-batches: each one's gradient is divided by their number, as engines do."""
    torch.set_num_threads(1)
    objective, batch = make(inputs), given(inputs)
    batch["weight"][5] = 0.0
    size = 8 // world_size // micro_batches
    starts = range(rank * size * micro_batches, (rank + 1) * size * micro_batches, size)
    parts = [part(batch, slice(start, start + size)) for start in starts]
    with torch.no_grad():
        objective.prepare(parts)
    losses = [objective.loss(each) for each in parts]
    for each in losses:
        (each.loss / micro_batches).backward()
    for parameter in objective.clip.parameters():
        if world_size > 1:
            torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= world_size
    gradients = {name: parameter.grad for name, parameter in objective.clip.named_parameters()}
    metrics = {name: [sum(e.metrics[name][i] for e in losses) for i in (0, 1)] for name in losses[0].metrics}
    return {"gradients": gradients, "metrics": metrics, "loss": float(losses[0].loss)}


@pytest.mark.slow
def test_cached_gradients_are_those_of_one_process_with_the_whole_batch(inputs: Path) -> None:
    whole = _gradients(0, 1, inputs)
    for ranks in ([_accumulated(0, 1, inputs, 4)], on_ranks(2, _accumulated, inputs, 2)):
        for name, expected in whole["gradients"].items():
            for rank in ranks:
                assert (rank["gradients"][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-6, name
        for name, expected in whole["metrics"].items():
            for index in (0, 1):
                torch.testing.assert_close(sum(rank["metrics"][name][index] for rank in ranks), expected[index])


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_the_world_size(inputs: Path) -> None:
    whole = _gradients(0, 1, inputs)
    ranks = on_ranks(2, _gradients, inputs)
    for name, expected in whole["gradients"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"][name], expected, rtol=1e-4, atol=1e-7, msg=name)
    assert whole["gradients"]["log_scale"].abs() > 1e-4
    for name, expected in whole["metrics"].items():
        for index in (0, 1):
            torch.testing.assert_close(sum(rank["metrics"][name][index] for rank in ranks), expected[index])


def test_it_learns_which_caption_belongs_to_which_image(inputs: Path) -> None:
    objective, batch = make(inputs), given(inputs, 4)  # four different captions
    optimizer = torch.optim.AdamW(objective.clip.parameters(), 3e-3)
    before = objective.validate(batch)
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss(batch).loss.backward()
        optimizer.step()
    after = objective.validate(batch)
    assert after["loss"].total < 0.3 * before["loss"].total
    assert after["recall_image"].total == after["recall_text"].total == 4
    assert objective.preview(batch).titles == batch["captions"]


def test_transformers_opens_the_export(inputs: Path, tmp_path: Path) -> None:
    objective, batch = make(inputs), given(inputs)
    facts = objective.export(tmp_path)
    assert facts["layout"] == "CLIP"
    text_encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert encode(tokenizer, batch["captions"]).equal(batch["token_ids"])
    objective.clip.eval()
    with torch.no_grad():
        ours = objective.clip.text_encoder(batch["token_ids"]).last_hidden_state
        assert text_encoder(batch["token_ids"]).last_hidden_state.equal(ours)
        expected = objective.clip(batch["images"], batch["token_ids"])
        opened = open_pair(tmp_path)
        found = opened.clip(batch["images"], batch["token_ids"])
    assert all(one.equal(other) for one, other in zip(expected, found, strict=True))
    assert opened.embed_texts(batch["captions"]).equal(expected.texts)


TRANSFORMER = {"kind": "transformer", "patch_size": 4, "width": 16, "layers": 1, "heads": 2}


def test_with_a_vision_transformer_it_is_a_clip_model_that_transformers_opens(inputs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    objective: Any = build_objective(tiny.clip_config(image_encoder=TRANSFORMER), inputs)
    batch = given(inputs)
    assert objective.export(tmp_path)["layout"] == "CLIPModel"
    model, tokenizer = CLIPModel.from_pretrained(tmp_path).eval(), CLIPTokenizer.from_pretrained(tmp_path)
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert told["image_mean"] == told["image_std"] == [0.5, 0.5, 0.5]  # values in [0, 1] to [-1, 1]
    objective.clip.eval()
    with torch.no_grad():
        ours = objective.clip(batch["images"], batch["token_ids"])
        theirs = model(pixel_values=batch["images"], input_ids=encode(tokenizer, batch["captions"]))
        opened = open_pair(tmp_path).clip(batch["images"], batch["token_ids"])
    torch.testing.assert_close(theirs.image_embeds, ours.images)
    torch.testing.assert_close(theirs.text_embeds, ours.texts)
    torch.testing.assert_close(theirs.logits_per_image, ours.scale * ours.images @ ours.texts.T)
    assert opened.images.equal(ours.images) and opened.texts.equal(ours.texts)
    with pytest.raises(ValueError, match="do not fit this config"):
        other = {**TRANSFORMER, "width": 8}
        build_objective(tiny.clip_config(image_encoder=other), inputs).load_weights(tmp_path)
    with pytest.raises(ValueError, match="not a multiple of 5"):
        tiny.clip_config(image_encoder={**TRANSFORMER, "patch_size": 5})


def test_the_statistics_of_its_embeddings_go_with_it(inputs: Path, tmp_path: Path) -> None:
    objective, batch = make(inputs), given(inputs)
    batch["weight"][2] = 0.0
    kept = [0, 1, 3, 4, 5, 6, 7]
    with torch.no_grad():
        figures = objective.finish([part(batch, slice(0, 4)), part(batch, slice(4, 8))])
        own = objective.clip(batch["images"], batch["token_ids"])
    images, texts = own.images[kept].double(), own.texts[kept].double()
    found = objective.statistics
    assert found is not None and found.count == 7
    torch.testing.assert_close(found.mean.double(), images.mean(0))
    torch.testing.assert_close(found.covariance.double(), torch.cov(images.T), rtol=1e-5, atol=1e-8)
    assert figures["dot_product"] == pytest.approx(float((images * texts).sum(1).mean()))
    again = make(inputs)
    again.load_state_dict(objective.state_dict())
    again.export(tmp_path)
    opened = open_pair(tmp_path).statistics
    assert opened is not None and opened.covariance.equal(found.covariance) and opened.dot_mean == found.dot_mean


def test_latent_diffusion_reads_text_with_the_export(inputs: Path, tmp_path: Path) -> None:
    from genmodels.text.encoder import fetch_pretrained

    make(inputs).export(tmp_path / "clip")
    fetch_pretrained(str(tmp_path / "clip"), tmp_path / "inputs")
    config = tiny.diffusion_config(autoencoder=None, text_encoder={"kind": "pretrained", "path": "models:/clip"})
    diffusion: Any = build_objective(config, tmp_path / "inputs")
    batch = given(inputs)
    assert diffusion.denoiser.backbone.config.cross_attention_dim == tiny.TEXT["width"]
    assert diffusion.condition(batch, dropout=False)["text"].shape == (8, tiny.TEXT["length"], tiny.TEXT["width"])
    assert diffusion.loss(batch).loss.isfinite()


def test_images_are_classified_by_sentences_alone(inputs: Path) -> None:
    """Against the embeddings of the sentences by hand; a sample without a label counts nowhere."""
    classes = {"7": "seven", "3": "three"}
    told = {"label": "json:digit", "classes": classes, "templates": ["a red {}", "a blue {} on paper"]}
    torch.manual_seed(0)
    objective: Any = build_objective(tiny.clip_config(zero_shot=told), inputs)
    batch = given(inputs, 6)
    batch["labels"], batch["weight"] = ["7", "3", "7", "", "4", "3"], torch.tensor([1.0, 1, 1, 1, 1, 0])
    with torch.no_grad():
        objective.begin_validation()
        found = objective.validate(batch)["zero_shot_accuracy"]
        names = [[f"a red {name}", f"a blue {name} on paper"] for name in classes.values()]
        means = torch.stack([objective.embed_texts(pair).mean(0) for pair in names])
        images = objective.clip(batch["images"], batch["token_ids"]).images[:3]
    nearest = (images @ torch.nn.functional.normalize(means, dim=1).T).argmax(1).tolist()
    right = [["7", "3"][number] for number in nearest]
    assert found.count == 3
    assert found.total == sum(one == other for one, other in zip(right, ["7", "3", "7"], strict=True))
    with pytest.raises(ValueError, match=r"needs one \{\}"):
        tiny.clip_config(zero_shot={**told, "templates": ["a photo"]})


def test_misfits_are_named(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a multiple of 4"):
        tiny.clip_config(image_size=18)
    with pytest.raises(ValueError, match="tokenizer"):
        build_objective(tiny.clip_config())
    objective = make(inputs)
    with pytest.raises(ValueError, match="no export of a CLIP"):
        objective.load_weights(tmp_path)
    objective.export(tmp_path)
    with pytest.raises(ValueError, match="do not fit this config: image_encoder"):
        build_objective(tiny.clip_config(embedding_dim=12), inputs).load_weights(tmp_path)
    assert objective.flops_per_sample() > 1e4
    counted = type(objective).abstract_networks(objective.config)["clip"].parameters()
    assert sum(p.numel() for p in counted) == sum(p.numel() for p in objective.clip.parameters())
