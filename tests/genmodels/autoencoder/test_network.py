from __future__ import annotations

import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from genmodels.autoencoder.network import PatchDiscriminator, hinge_loss, kl_divergence


def test_kl_equals_torch_distributions():
    mean, log_variance = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = torch_kl(posterior, Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected, rtol=0, atol=1e-9)


def test_hinge_is_2_at_0_and_0_beyond_the_margin():
    zeros = torch.zeros(3, 1, 2, 2)
    assert hinge_loss(zeros, zeros).equal(torch.full((3,), 2.0))
    assert hinge_loss(zeros + 1.5, zeros - 1.5).equal(torch.zeros(3))


def test_three_layers_see_patches_of_70_pixels():
    """A patch's score reacts to pixels within 70×70. Normalisation looks wider, so it is taken out here."""
    network = PatchDiscriminator(channels=4, layers=3)
    for index, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            network.layers[index] = torch.nn.Identity()
    images = torch.zeros(1, 3, 160, 160, requires_grad=True)
    scores = network(images + 0.1)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    touched = images.grad.abs().sum((0, 1)) > 0
    assert touched.any(0).sum() == 70 and touched.any(1).sum() == 70


def test_a_score_does_not_depend_on_the_batch():
    network, images = PatchDiscriminator(channels=8, layers=2), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]), rtol=1e-4, atol=1e-6)
    assert not any("BatchNorm" in type(m).__name__ for m in network.modules())
