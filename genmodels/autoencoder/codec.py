"""A trained autoencoder of either regulariser, as diffusion uses it: images to scaled latents, and back."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from genmodels import random
from genmodels.weights import weights_digest

CLASSES: dict[str, type] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class LatentCodec(nn.Module):
    """Encodes to latents of unit deviation; frozen.

    The latents of a vector-quantised autoencoder are those before the codebook: its decoder begins with it, and so
    forgives small errors (Rombach et al. 2022, section 3.1).
    """

    def __init__(self, model: AutoencoderKL | VQModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @staticmethod
    def from_folder(folder: Path) -> LatentCodec:
        """Open an AutoencoderKL or a VQModel of diffusers.

        Raises:
            ValueError: the folder holds something else.
        """
        config = folder / "config.json"
        name = json.loads(config.read_text()).get("_class_name") if config.is_file() else "nothing"
        if name not in CLASSES:
            raise ValueError(f"{folder} holds {name}, and no {' or '.join(CLASSES)}")
        source: Any = CLASSES[name]
        return LatentCodec(source.from_pretrained(folder, use_safetensors=True, local_files_only=True))

    @cached_property
    def digest(self) -> str:
        """Of the weights and the scaling: which autoencoder it is. Sixteen hexadecimal digits."""
        return weights_digest(
            self.model, f"{type(self.model).__name__} {self.model.config.scaling_factor} {self.shift}"
        )

    @property
    def opens_in_pipelines(self) -> bool:
        """Whether it is an AutoencoderKL without a shift, as diffusers' pipelines of latent diffusion expect."""
        return isinstance(self.model, AutoencoderKL) and not self.shift

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side."""
        return 2 ** (len(self.model.config.block_out_channels) - 1)

    @property
    def shift(self) -> float:
        """What is taken off latents before they are scaled: not 0 in some autoencoders that others trained."""
        return float(self.model.config.get("shift_factor") or 0.0)

    @property
    def channels(self) -> int:
        """Of the latents."""
        config: Any = self.model.config
        return int(config.get("vq_embed_dim") or config.latent_channels)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """What `from_moments` makes latents of, float32 (batch, channels, height / factor, width / factor): mean and
        log-variance of a KL autoencoder's posterior, one after the other, or the latents of a vector-quantised one."""
        encoded: Any = self.model.encode(images.to(self._dtype))
        return (encoded.latents if isinstance(self.model, VQModel) else encoded.latent_dist.parameters).float()

    def from_moments(self, moments: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Scaled latents as `encode` gives them, of `moments`."""
        if not isinstance(self.model, VQModel):
            moments, log_variance = moments.chunk(2, dim=1)
            if seeds is not None:
                deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # the bounds of diffusers' posterior
                moments = moments + deviation * random.normal(seeds, moments.shape[1:], "latent")
        return (moments - self.shift) * self.model.config.scaling_factor

    def moments_shape(self, image_size: int) -> tuple[int, int, int]:
        """Of one image's `moments`."""
        channels = self.channels if isinstance(self.model, VQModel) else 2 * self.channels
        return channels, image_size // self.factor, image_size // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Scaled latents, float32 (batch, channels, height / factor, width / factor).

        Args:
            images: (batch, 3, height, width) in [-1, 1].
            seeds: int64 (batch,): a KL autoencoder's posterior is sampled by these, or gives its mean without.
        """
        return self.from_moments(self.moments(images), seeds)

    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32, nominally in [-1, 1], of scaled latents."""
        latents = latents / self.model.config.scaling_factor + self.shift
        decoded: Any = self.model.decode(latents.to(self._dtype))
        return decoded.sample.float()
