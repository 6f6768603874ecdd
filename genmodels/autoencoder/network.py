"""The networks of autoencoder training: diffusers' autoencoders behind one forward each, and a patch discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from genmodels.autoencoder.vector_quantiser import VectorQuantiser
from genmodels.weights import copy_weights, load_into, open_folder


class Reconstruction(NamedTuple):
    """What one pass gives."""

    images: Tensor  # (batch, 3, height, width)
    latents: Tensor  # (batch, latent_channels, height / f, width / f): what diffusion would learn
    penalty: Tensor  # (batch,): KL divergence in nats, or the mean squared distance to the codes
    mean: Tensor | None = None  # of the posterior, like the latents
    log_variance: Tensor | None = None
    codes: Tensor | None = None  # int64 (batch, height / f, width / f)


class ReconstructingVQ(nn.Module):
    """Encode, quantise, decode: one module call, so that an engine sees one network with one forward."""

    def __init__(self, model: VQModel, quantiser: VectorQuantiser) -> None:
        """Args: of `model`, everything but its own codebook is used."""
        super().__init__()
        model.quantize = quantiser
        self.model = model

    @property
    def quantiser(self) -> VectorQuantiser:
        found = self.model.quantize
        assert isinstance(found, VectorQuantiser)
        return found

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the decoder ends with."""
        return self.model.decoder.conv_out.weight

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Reconstruct `images` (batch, 3, height, width) in [-1, 1]; `noise` is not read."""
        encoded: Any = self.model.encode(images.to(next(self.model.parameters()).dtype))
        quantised = self.quantiser(encoded.latents)
        decoded = self.model.decoder(self.model.post_quant_conv(quantised.latents))
        return Reconstruction(
            decoded.float(), encoded.latents.float(), quantised.commitment.float(), codes=quantised.codes
        )

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.model.enable_gradient_checkpointing()

    def save(self, folder: Path, scaling_factor: float, shift: Tensor) -> None:
        """As a VQModel of diffusers; see `centred` for `shift`."""
        state = {key: value for key, value in self.model.state_dict().items() if not key.startswith("quantize.")}
        state = centred({**state, "quantize.embedding.weight": self.quantiser.codebook}, shift)
        _save(VQModel, self.model.config, state, scaling_factor, folder)

    def load(self, folder: Path) -> None:
        """From a VQModel folder. Raises ValueError where the weights are missing or have other shapes."""
        codec = open_folder(VQModel, folder)
        state = {name.replace("quantize.embedding.weight", "quantize.codebook"): v for name, v in codec.items()}
        own = self.model.state_dict()
        state |= {name: own[name] for name in ("quantize.usage", "quantize.totals")}
        copy_weights(state, self.model, folder)
        self.quantiser.restart()


class ReconstructingAutoencoder(nn.Module):
    """Encode, sample the posterior, decode: one module call, so that an engine sees one network with one forward."""

    def __init__(self, model: AutoencoderKL) -> None:
        super().__init__()
        self.model = model

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the decoder ends with."""
        return self.model.decoder.conv_out.weight

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Reconstruct.

        Args:
            images: (batch, 3, height, width) in [-1, 1].
            noise: standard normal, shaped like the latents; None decodes the posterior's mean.
        """
        posterior = self.model.encode(images.to(next(self.model.parameters()).dtype)).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
        decoded = self.model.decode(latents).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        penalty = kl_divergence(mean, log_variance)
        return Reconstruction(decoded.float(), latents.float(), penalty, mean, log_variance)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.model.enable_gradient_checkpointing()

    def save(self, folder: Path, scaling_factor: float, shift: Tensor) -> None:
        """As an AutoencoderKL of diffusers; see `centred` for `shift`."""
        _save(AutoencoderKL, self.model.config, centred(self.model.state_dict(), shift), scaling_factor, folder)

    def load(self, folder: Path) -> None:
        """From an AutoencoderKL folder. Raises ValueError where the weights are missing or have other shapes."""
        load_into(self.model, folder)


def centred(state: dict[str, Tensor], shift: Tensor) -> dict[str, Tensor]:
    """The weights of an autoencoder whose latents are those of `state` minus `shift`, and whose images are the same.

    The two 1×1 convolutions around the latents take the shift in, and so do the codes where there are any: diffusers'
    pipelines multiply latents by a factor, and know of no shift.

    Args:
        state: of diffusers' AutoencoderKL or VQModel.
        shift: (latent channels,).
    """
    into, out, codes = "quant_conv.bias", "post_quant_conv", "quantize.embedding.weight"
    shift = shift.to(state[into].device).double()
    moved = state[into].double().clone()
    moved[: len(shift)] -= shift  # of a KL autoencoder the means; log variances follow them
    bias = state[f"{out}.bias"].double() + state[f"{out}.weight"].flatten(1).double() @ shift
    changed = {into: moved, f"{out}.bias": bias}
    if codes in state:
        changed[codes] = state[codes].double() - shift
    return {**state, **{name: value.to(state[name].dtype) for name, value in changed.items()}}


def _save(kind: Any, config: Mapping[str, Any], state: dict[str, Tensor], scaling_factor: float, folder: Path) -> None:
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    theirs = kind(**{**known, "scaling_factor": scaling_factor})
    theirs.load_state_dict(state)
    theirs.save_pretrained(folder, safe_serialization=True)


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

    def __init__(self, channels: int = 64, layers: int = 3, in_channels: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
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
        """Scores (batch, 1, rows, columns), higher for real, of images (batch, channels, height, width) in [-1, 1]."""
        return self.layers(images.to(next(self.parameters()).dtype)).float()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss per sample: scores (batch, …) of each → (batch,); 2 where all scores are 0.

    Lim and Ye, "Geometric GAN" (2017), eq. 14.
    """
    return (torch.relu(1 - real) + torch.relu(1 + fake)).flatten(1).mean(1)
