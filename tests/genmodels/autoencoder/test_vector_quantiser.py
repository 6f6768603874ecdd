"""The codebook against a k-d tree, its own definition, and one process against two."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import VQModel
from scipy.spatial import cKDTree

from genmodels.autoencoder.codec import LatentCodec
from genmodels.autoencoder.vector_quantiser import VectorQuantiser
from genmodels.families import build_objective
from tests.genmodels import tiny
from tests.processes import on_ranks

VQ = {"kind": "vq", "codebook_size": 32}


def latents(seed: int = 0, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_codes_are_the_nearest_of_a_kd_tree():
    torch.manual_seed(0)
    quantiser, z = VectorQuantiser(50, 3), latents()
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 3)
    distances, expected = cKDTree(quantiser.codebook.numpy()).query(vectors.numpy())
    result = quantiser(z)
    assert result.codes.flatten().tolist() == expected.tolist()
    assert result.latents.permute(0, 2, 3, 1).reshape(-1, 3).allclose(quantiser.codebook[expected], atol=1e-6)
    mean = torch.tensor(distances).square().reshape(4, -1).sum(1) / (3 * 16)
    torch.testing.assert_close(result.commitment.double(), mean, rtol=1e-5, atol=0)


def test_the_gradient_goes_straight_through_and_the_codebook_has_none():
    quantiser, z = VectorQuantiser(50, 3), latents().requires_grad_()
    result = quantiser(z)
    upstream = torch.randn_like(result.latents)
    (gradient,) = torch.autograd.grad((result.latents * upstream).sum(), z)
    assert gradient.equal(upstream) and not list(quantiser.parameters())


def test_codes_are_running_means_of_what_they_replace():
    quantiser = VectorQuantiser(2, 3, decay=0.75, revive_below=0.0)
    quantiser.codebook.copy_(torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]]))
    usage, totals = torch.zeros(2), torch.zeros(2, 3)
    for step in range(5):
        z = latents(step)
        codes = quantiser(z).codes
        weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
        quantiser.update(z, codes, weight, step)
        vectors, flat = z[weight > 0].permute(0, 2, 3, 1).reshape(-1, 3), codes[weight > 0].flatten()
        keep = 0.75 if step else 0.0
        for code in range(2):
            usage[code] = keep * usage[code] + (1 - keep) * (flat == code).sum()
            totals[code] = keep * totals[code] + (1 - keep) * vectors[flat == code].sum(0)
        torch.testing.assert_close(quantiser.codebook, totals / usage[:, None], rtol=1e-5, atol=1e-6)


def test_even_use_has_the_perplexity_of_the_codebook():
    quantiser = VectorQuantiser(16, 3)
    codes = torch.arange(64).remainder(16).view(4, 4, 4)
    assert quantiser.update(latents(), codes, torch.ones(4), 0).item() == pytest.approx(16, rel=1e-5)
    assert quantiser.update(latents(), torch.zeros_like(codes), torch.ones(4), 0).item() == pytest.approx(1, rel=1e-5)


def test_dead_codes_are_put_on_latents_of_the_batch():
    quantiser = VectorQuantiser(8, 3)
    quantiser.codebook.fill_(1000.0)
    quantiser.codebook[0] = 0
    z = latents()
    quantiser.update(z, quantiser(z).codes, torch.tensor([1.0, 1.0, 1.0, 0.0]), 7)
    members = {tuple(v) for v in z[:3].permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    assert all(tuple(code) in members for code in quantiser.codebook[1:].tolist())
    assert len({tuple(code) for code in quantiser.codebook.tolist()}) > 4 and quantiser.usage.min() > 0


def test_an_infinite_batch_moves_nothing():
    quantiser, z = VectorQuantiser(8, 3), latents()
    quantiser.update(z, quantiser(z).codes, torch.ones(4), 0)
    before = {name: buffer.clone() for name, buffer in quantiser.named_buffers()}
    broken = z.clone()
    broken[0, 0, 0, 0] = math.inf
    quantiser.update(broken, quantiser(z).codes, torch.ones(4), 1)
    assert all(buffer.equal(before[name]) for name, buffer in quantiser.named_buffers())


def _codebook_of(rank: int, world_size: int) -> tuple[torch.Tensor, float]:
    torch.manual_seed(0)
    quantiser = VectorQuantiser(16, 3)
    for step in range(4):
        z, weight = latents(step, 8), torch.tensor([1.0] * 7 + [0.0])
        own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        perplexity = quantiser.update(z[own], quantiser(z[own]).codes, weight[own], step)
    return quantiser.codebook, perplexity.item()


def test_two_ranks_keep_the_codebook_of_one():
    alone, perplexity = _codebook_of(0, 1)
    for codebook, theirs in on_ranks(2, _codebook_of):
        torch.testing.assert_close(codebook, alone, rtol=1e-5, atol=1e-6)
        assert theirs == pytest.approx(perplexity, rel=1e-5)


def test_it_learns_and_diffusers_reconstructs_the_same(tmp_path):
    torch.manual_seed(0)
    objective, batch = build_objective(tiny.autoencoder_config(regulariser=VQ)), tiny.batch(8)
    batch["images"] = batch["images"][:, :, :1, :1].expand(-1, -1, 16, 16).contiguous()
    optimizer = torch.optim.AdamW(objective.autoencoder.parameters(), 3e-3)
    with torch.no_grad():
        before = objective.validate(batch)["l1"].total
    for step in range(80):
        optimizer.zero_grad()
        result = objective.autoencoder_loss({**batch, "step": step})
        result.loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = objective.validate(batch)
    assert after["l1"].total < 0.5 * before and set(after) == {"loss", "l1", "commitment", "psnr"}
    assert 1 < result.metrics["perplexity"].total / 8 <= 32
    objective.finish([batch])
    facts = objective.export(tmp_path)
    assert facts["layout"] == "VQModel"
    theirs, ours = VQModel.from_pretrained(tmp_path), objective.reconstruct(batch)
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch["images"]).sample, ours.images, rtol=1e-4, atol=1e-4)
        codec = LatentCodec.from_folder(tmp_path)
        encoded = codec.encode(batch["images"])
        centred = ours.latents - objective.latent_mean.float().view(1, -1, 1, 1)
        torch.testing.assert_close(encoded, centred * objective.scaling_factor, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(codec.decode(encoded), ours.images, rtol=1e-4, atol=1e-4)
    again = build_objective(tiny.autoencoder_config(regulariser=VQ))
    again.load_weights(tmp_path)
    torch.testing.assert_close(again.reconstruct(batch).images, ours.images, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit"):
        build_objective(tiny.autoencoder_config(regulariser=VQ | {"codebook_size": 16})).load_weights(tmp_path)


def test_accumulation_is_refused():
    (phase,) = build_objective(tiny.autoencoder_config(regulariser=VQ)).phases
    assert phase.couples_samples


def test_diffusion_in_its_latents(tmp_path, inputs):
    from genmodels.diffusion.pipeline import TextToImage

    torch.manual_seed(0)
    autoencoder, batch = build_objective(tiny.autoencoder_config(regulariser=VQ)), tiny.batch(8)
    autoencoder.autoencoder_loss({**batch, "step": 0})
    autoencoder.finish([batch])
    autoencoder.export(tmp_path / "autoencoder")
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    objective = build_objective(tiny.diffusion_config(), tmp_path)
    batch = tiny.with_tokens(batch, inputs)
    objective.loss(batch).loss.backward()
    assert objective.latents(batch).std().item() == pytest.approx(1, abs=0.05)
    assert objective.export(tmp_path / "export")["layout"] == "own"
    model = TextToImage.from_folder(tmp_path / "export")
    assert model.draw(tiny.CAPTIONS[:2], [1, 2], num_steps=2).shape == (2, 16, 16, 3)
