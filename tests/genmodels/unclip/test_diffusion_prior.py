"""The diffusion prior: the regression on Gaussian embeddings, diffusers' own opening of it, and what it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PriorTransformer
from torch import Tensor, nn

from genmodels.clip.frozen import FrozenClip
from genmodels.clip.statistics import EmbeddingStatistics
from genmodels.diffusion.sampler import NOTHING
from genmodels.families import build_objective
from genmodels.unclip import diffusion_prior
from genmodels.unclip.diffusion_prior import DiffusionPrior, draw_embeddings, nearest, open_prior, sample_embeddings
from genmodels.unclip.prior import read_captions
from tests.genmodels import tiny

DIM = 2


class GaussianClip(nn.Module):
    """In place of a CLIP: captions are rows of numbers, in thousandths, and are their own embeddings."""

    text_width = embedding_dim = DIM
    text_length = 1

    def __init__(self, statistics: EmbeddingStatistics) -> None:
        super().__init__()
        self.statistics = statistics

    def read_texts(self, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = token_ids.float() / 1000
        return torch.zeros(len(values), 1, DIM), torch.ones(len(values), 1, dtype=torch.bool), values

    def tokens(self, texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), DIM, dtype=torch.int64)


@pytest.mark.slow
def test_on_gaussian_embeddings_its_mean_is_the_linear_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2 * DIM, 2 * DIM, generator=generator) / 3
    pairs = torch.randn(20000, 2 * DIM, generator=generator) @ mix.T
    texts, images = pairs[:, :DIM], pairs[:, DIM:]
    covariance = mix @ mix.T
    regression = covariance[DIM:, :DIM] @ torch.linalg.inv(covariance[:DIM, :DIM])  # Σ_it Σ_tt⁻¹
    clip: Any = GaussianClip(EmbeddingStatistics(images.mean(0), torch.cov(images.T), 0.0, 1.0, len(images)))
    torch.manual_seed(0)
    config = tiny.prior_config(embedding_member="clip.npy", heads=4, head_dim=16, layers=2, condition_dropout=0.0)
    objective = DiffusionPrior(config, clip)
    optimizer = torch.optim.AdamW(objective.prior.parameters(), 2e-3)
    steps, size = 700, 256
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(texts), (size,), generator=generator)
        batch = {
            "image_embeddings": images[rows],
            "token_ids": (texts[rows] * 1000).round().long(),
            "seeds": torch.arange(step * size, (step + 1) * size),
            "weight": torch.ones(size),
        }
        optimizer.zero_grad()
        objective.loss(batch).loss.backward()
        optimizer.step()
    asked = (texts[:4000] * 1000).round().long()
    with torch.no_grad():
        drawn = sample_embeddings(objective.prior, read_captions(clip, asked), NOTHING, torch.arange(len(asked)), 50)
    given = asked.float() / 1000
    found = torch.linalg.lstsq(given, drawn).solution.T
    residuals = covariance[DIM:, DIM:] - regression @ covariance[:DIM, DIM:]
    # Four standard errors of a regression on so many draws, and 5 % of the whole for what is left to learn.
    error = (residuals.diagonal()[:, None] / covariance.diagonal()[None, :DIM] / len(asked)).sqrt()
    assert ((found - regression).abs() <= 4 * error + 0.05 * regression.norm()).all(), (found, regression)
    spread = (drawn - given @ found.T).var(0)
    assert torch.allclose(spread, residuals.diagonal(), rtol=0.15), "the draws spread as the residuals do"


@pytest.fixture(scope="module")
def objective(inputs: Path) -> DiffusionPrior:
    torch.manual_seed(0)
    made = build_objective(tiny.prior_config(), inputs)
    assert isinstance(made, DiffusionPrior)
    made.prior.eval()
    return made


def test_diffusers_opens_it_and_computes_the_same(objective: DiffusionPrior, inputs: Path, tmp_path: Path) -> None:
    facts = objective.export(tmp_path)
    assert facts["layout"] == "PriorTransformer"
    theirs = PriorTransformer.from_pretrained(tmp_path / "prior").eval()
    clip = objective.clip
    statistics = clip.statistics
    assert statistics is not None
    torch.testing.assert_close(theirs.clip_mean[0], statistics.mean)
    torch.testing.assert_close(theirs.clip_std[0], statistics.deviation)
    told = read_captions(clip, tiny.with_tokens(tiny.batch(4), inputs)["token_ids"])
    noisy, timesteps = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 400, 700, 999])
    with torch.no_grad():
        ours = diffusion_prior.predict(objective.prior, noisy, timesteps, told)
        answer = theirs(
            noisy,
            timesteps,
            proj_embedding=told["embedding"] * 4,  # √16
            encoder_hidden_states=told["features"],
            attention_mask=told["mask"],
        ).predicted_image_embedding
        torch.testing.assert_close(answer, ours, rtol=0, atol=1e-5)
        drawn = draw_embeddings(open_prior(tmp_path / "prior"), told, NOTHING, torch.arange(4), 5)
        assert drawn.equal(draw_embeddings(objective.prior, told, NOTHING, torch.arange(4), 5))
        # What diffusers' pipelines do with the result gives the embedding before it is made a unit vector.
        scaled = theirs.post_process_latents(ours)
    torch.testing.assert_close(scaled, ours * statistics.deviation + statistics.mean)
    assert FrozenClip.from_folder(tmp_path / "clip").digest == clip.digest


def test_padding_is_not_seen(objective: DiffusionPrior, inputs: Path) -> None:
    told = dict(read_captions(objective.clip, tiny.with_tokens(tiny.batch(4), inputs)["token_ids"]))
    other = {**told, "features": torch.where(told["mask"][..., None], told["features"], told["features"] + 3)}
    assert not told["mask"].all()
    noisy, timesteps = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), torch.full((4,), 500)
    with torch.no_grad():
        one, two = (diffusion_prior.predict(objective.prior, noisy, timesteps, each) for each in (told, other))
    torch.testing.assert_close(one, two)


def test_an_embedding_depends_on_its_caption_and_seed_alone(objective: DiffusionPrior, inputs: Path) -> None:
    token_ids = tiny.with_tokens(tiny.batch(4), inputs)["token_ids"]
    told, empty = (read_captions(objective.clip, ids) for ids in (token_ids, objective.clip.tokens([""] * 4)))
    seeds = torch.tensor([7, 8, 9, 7])
    with torch.no_grad():
        drawn = draw_embeddings(objective.prior, told, empty, seeds, 5, guidance_scale=2.0)
        alone = draw_embeddings(
            objective.prior,
            {k: v[2:3] for k, v in told.items()},
            {k: v[2:3] for k, v in empty.items()},
            seeds[2:3],
            5,
            2.0,
        )
        plain = draw_embeddings(objective.prior, told, empty, seeds, 5, guidance_scale=1.0)
        conditional = draw_embeddings(objective.prior, told, NOTHING, seeds, 5)
        seeded = draw_embeddings(objective.prior, told, NOTHING, seeds + 1, 5)
    torch.testing.assert_close(alone[0], drawn[2])
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(4))
    assert plain.equal(conditional) and not torch.allclose(plain, drawn)
    assert not torch.allclose(conditional, seeded)
    assert not torch.allclose(conditional[0], conditional[3]), "the same seed, another caption"


def test_of_the_candidates_the_nearest_to_the_caption_is_kept(objective: DiffusionPrior, inputs: Path) -> None:
    candidates = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]]])
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert nearest(candidates, wanted).tolist() == [[1.0, 0.0], pytest.approx([0.8, 0.6])]
    told = read_captions(objective.clip, tiny.with_tokens(tiny.batch(16), inputs)["token_ids"])
    with torch.no_grad():
        one, many = (
            (
                draw_embeddings(objective.prior, told, NOTHING, torch.arange(16), 5, candidates=n) * told["embedding"]
            ).sum(1)
            for n in (1, 4)
        )
    assert (many >= one - 1e-6).all() and (many > one + 1e-6).any()


def test_stored_embeddings_and_images_give_the_same_loss(inputs: Path) -> None:
    batch = tiny.with_tokens(tiny.batch(6), inputs)
    losses = []
    for member in (None, "clip.npy"):
        torch.manual_seed(0)
        made: Any = build_objective(tiny.prior_config(embedding_member=member), inputs)
        stored = made.clip.embed_images(batch["images"]).half()
        given = {key: value for key, value in batch.items() if key != "images"} if member else dict(batch)
        losses.append(float(made.loss({**given, "image_embeddings": stored}).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_validation_tells_how_near_drawn_embeddings_are(objective: DiffusionPrior, inputs: Path) -> None:
    batch = tiny.with_tokens(tiny.batch(6), inputs)
    batch["weight"][1] = 0
    with torch.no_grad():
        found = objective.validate(batch)
    assert set(found) == {"loss", "cosine", "cosine_of_text"} and found["loss"].count == 5
    assert -5 <= found["cosine"].total <= 5
    assert objective.flops_per_sample() > 1e4


def test_misfits_are_named(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clip/"):
        build_objective(tiny.prior_config(), tmp_path)
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    clip: Any = build_objective(tiny.clip_config(), inputs)  # embeddings of 8 features
    with torch.no_grad():
        clip.finish([tiny.with_tokens(tiny.batch(4), inputs)])
    (narrow / "clip").mkdir()
    clip.export(narrow / "clip")
    with pytest.raises(ValueError, match="token features as wide as embeddings, and this CLIP's have 16 and 8"):
        build_objective(tiny.prior_config(), narrow)
    clip.statistics = None
    (tmp_path / "bare" / "clip").mkdir(parents=True)
    clip.export(tmp_path / "bare" / "clip")
    with pytest.raises(ValueError, match="without the statistics of its embeddings"):
        build_objective(tiny.prior_config(), tmp_path / "bare")
