"""The autoregressive prior: its quantiser, what its codes may see, and sampling with a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genmodels import random
from genmodels.clip.statistics import EmbeddingStatistics
from genmodels.diffusion.sampler import NOTHING
from genmodels.families import build_objective
from genmodels.unclip.autoregressive_prior import (
    AutoregressivePrior,
    AutoregressivePriorNetwork,
    draw_embeddings,
    open_prior,
)
from genmodels.unclip.prior import read_captions
from tests.genmodels import tiny

KIND = "autoregressive_prior"


@pytest.fixture(scope="module")
def objective(inputs: Path) -> AutoregressivePrior:
    torch.manual_seed(0)
    made = build_objective(tiny.prior_config(KIND), inputs)
    assert isinstance(made, AutoregressivePrior)
    return made


def test_components_are_ordered_by_eigenvalue_and_codes_give_the_embedding_back() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, 6, generator=generator) * torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05, 0.02]) + 1
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    embeddings = torch.nn.functional.normalize(values @ turn, dim=1)
    statistics = EmbeddingStatistics(embeddings.mean(0), torch.cov(embeddings.T), 0.5, 0.1, 5000)
    config = tiny.prior_config(KIND, components=6, buckets=256)
    network = AutoregressivePriorNetwork(config, 6, 4, 3, statistics)
    assert (network.deviation[:-1] >= network.deviation[1:]).all()
    torch.testing.assert_close(network.basis.T @ network.basis, torch.eye(6), atol=1e-5, rtol=0)
    scores = (embeddings - network.mean) @ network.basis
    torch.testing.assert_close(scores.var(0).sqrt(), network.deviation, rtol=1e-3, atol=1e-4)
    codes = network.quantise(embeddings)
    assert codes.min() >= 0 and codes.max() <= 255
    inside = (scores / network.deviation).abs().amax(1) < 4  # what the buckets cover
    error = (network.embed(codes) - embeddings)[inside] @ network.basis
    assert inside.float().mean() > 0.99
    assert (error.abs() <= 1.01 * network.deviation * 4 / 256 + 1e-3).all(), "within half a bucket"
    few = AutoregressivePriorNetwork(tiny.prior_config(KIND, components=3, buckets=256), 6, 4, 3, statistics)
    kept = (few.embed(few.quantise(embeddings)) * embeddings).sum(1).mean()
    assert 0.9 < kept < 1


def test_dot_products_fall_into_buckets_of_equal_shares() -> None:
    config = tiny.prior_config(KIND, components=2, dot_buckets=8)
    statistics = EmbeddingStatistics(torch.zeros(4), torch.eye(4), 0.3, 0.05, 10)
    network = AutoregressivePriorNetwork(config, 4, 4, 3, statistics)
    dots = 0.3 + 0.05 * random.normal(torch.arange(8000), ())
    counts = torch.bincount(network.quantise_dots(dots), minlength=8)
    assert counts.shape == (8,) and ((counts - 1000).abs() < 4 * (1000 * 7 / 8) ** 0.5).all()
    assert network.quantise_dots(torch.tensor([-9.0, 0.2999, 0.3001, 9.0])).tolist() == [0, 3, 4, 7]


def test_a_code_sees_the_caption_and_the_codes_before_it_alone(objective: AutoregressivePrior, inputs: Path) -> None:
    told = read_captions(objective.clip, tiny.with_tokens(tiny.batch(2), inputs)["token_ids"])
    dots, codes = torch.tensor([3, 3]), torch.randint(0, 8, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = objective.prior(told, dots, codes)
        for place in range(6):
            changed = codes.clone()
            changed[:, place] = (changed[:, place] + 1) % 8
            after = objective.prior(told, dots, changed)
            torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1], rtol=0, atol=1e-6)
            if place < 5:
                assert not torch.allclose(after[:, place + 1 :], before[:, place + 1 :], atol=1e-6)
        assert not torch.allclose(objective.prior(told, dots + 1, codes), before, atol=1e-6)
        padded = {**told, "features": torch.where(told["mask"][..., None], told["features"], told["features"] + 3)}
        torch.testing.assert_close(objective.prior(padded, dots, codes), before)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sampling_with_a_cache_is_that_of_full_passes(
    guidance_scale: float, objective: AutoregressivePrior, inputs: Path
) -> None:
    clip, prior, seeds = objective.clip, objective.prior, torch.tensor([5, 6, 7])
    told = read_captions(clip, tiny.with_tokens(tiny.batch(3), inputs)["token_ids"])
    empty = read_captions(clip, clip.tokens([""] * 3))
    buckets = objective.config.dot_buckets
    dots = buckets // 2 + random.integers(seeds, buckets - buckets // 2, "dot product")
    draws = random.uniform(seeds, (6,), "codes")
    codes = torch.zeros(3, 6, dtype=torch.int64)
    with torch.no_grad():
        found = draw_embeddings(prior, told, empty, seeds, guidance_scale)
        for place in range(6):
            logits = prior(told, dots, codes)[:, place]
            if guidance_scale != 1:
                free = prior(empty, torch.full_like(dots, buckets), codes)[:, place]
                logits = free + guidance_scale * (logits - free)
            shares = logits.double().softmax(1).cumsum(1)
            codes[:, place] = (shares < draws[:, place, None]).sum(1)
        torch.testing.assert_close(found, prior.embed(codes))
        one = {key: value[1:2] for key, value in told.items()}
        nothing = {key: value[1:2] for key, value in empty.items()}
        torch.testing.assert_close(draw_embeddings(prior, one, nothing, seeds[1:2], guidance_scale)[0], found[1])


def test_it_learns_and_opens_again(inputs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = build_objective(tiny.prior_config(KIND), inputs)
    assert isinstance(made, AutoregressivePrior)
    batch = tiny.with_tokens(tiny.batch(4), inputs)
    optimizer = torch.optim.AdamW(made.prior.parameters(), 1e-2)
    first = float(made.loss(dict(batch)).loss.detach())
    for _ in range(80):
        optimizer.zero_grad()
        made.loss(dict(batch)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = made.validate(dict(batch))
    assert found["loss"].total / 4 < 0.5 * first
    assert made.export(tmp_path)["layout"] == "own" and made.flops_per_sample() > 1e4
    told = read_captions(made.clip, batch["token_ids"])
    with torch.no_grad():
        expected = draw_embeddings(made.prior, told, NOTHING, batch["seeds"])
        assert draw_embeddings(open_prior(tmp_path / "prior"), told, NOTHING, batch["seeds"]).equal(expected)
    again = build_objective(tiny.prior_config(KIND), inputs)
    again.load_weights(tmp_path)
    assert float(again.loss(dict(batch)).loss.detach()) == float(made.loss(dict(batch)).loss.detach())
    with pytest.raises(ValueError, match="no autoregressive prior"):
        open_prior(tmp_path / "clip")
    with pytest.raises(ValueError, match="components is 17, and the embeddings have 16"):
        build_objective(tiny.prior_config(KIND, components=17), inputs)
