"""The networks of autoencoder training: diffusers' KL autoencoder behind one forward, and a patch discriminator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


class Reconstruction(NamedTuple):
    """What one pass gives: images (batch, 3, height, width), and the posterior's mean, log variance and sample."""

    images: Tensor
    mean: Tensor  # (batch, latent_channels, height / f, width / f), as the next two
    log_variance: Tensor
    latents: Tensor


class ReconstructingAutoencoder(nn.Module):
    """Encode, sample the posterior, decode: one module call, so that an engine sees one network with one forward."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    @property
    def latent_channels(self) -> int:
        return int(self.model.config.latent_channels)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Reconstruct.

        Args:
            images: (batch, 3, height, width) in [-1, 1].
            noise: standard normal, shaped like the latents; None decodes the posterior's mean.
        """
        posterior = self.model.encode(images.to(next(self.model.parameters()).dtype)).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        decoded = self.model.decode(latents).sample
        return Reconstruction(decoded.float(), posterior.mean.float(), posterior.logvar.float(), latents.float())

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.model.enable_gradient_checkpointing()


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, I)) in nats, summed over a sample: (batch, …) → (batch,).

    Kingma and Welling, "Auto-Encoding Variational Bayes" (ICLR 2014), appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class PatchDiscriminator(nn.Module):
    """One score per overlapping patch; with three layers a patch is 70×70 pixels.

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (CVPR 2017), section 3.2.2, with
    group normalisation in place of batch normalisation: no sample's score depends on its batch.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, wider // 4), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        parts.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Scores (batch, 1, rows, columns), higher for real, of images (batch, 3, height, width) in [-1, 1]."""
        return self.layers(images.to(next(self.parameters()).dtype)).float()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss per sample: scores (batch, …) of each → (batch,); 2 where all scores are 0.

    Lim and Ye, "Geometric GAN" (2017), eq. 14.
    """
    return (torch.relu(1 - real) + torch.relu(1 + fake)).flatten(1).mean(1)
