"""The training objective of latent diffusion's autoencoders, with either regulariser.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022), appendix G, with the
adversarial part of Esser et al., "Taming Transformers" (CVPR 2021) as a second phase.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from genmodels import random
from genmodels.autoencoder.config import AutoencoderConfig, KlRegulariser
from genmodels.autoencoder.network import (
    PatchDiscriminator,
    ReconstructingAutoencoder,
    ReconstructingVQ,
    Reconstruction,
    hinge_loss,
)
from genmodels.autoencoder.perceptual import PerceptualDistance
from genmodels.autoencoder.vector_quantiser import VectorQuantiser
from genmodels.metrics.image import psnr
from genmodels.objective import Batch, Mean, Objective, Phase, PhaseLoss, Preview
from genmodels.weights import forward_flops


class Autoencoder(Objective):
    """Reconstruction, regulariser and optionally perceptual and adversarial terms; the latents' scale is measured last.

    The loss is Rombach's, divided by the number of values in an image: weights mean the same at every resolution.
    """

    def __init__(self, config: AutoencoderConfig, perceptual: PerceptualDistance | None = None) -> None:
        self.config = config
        self.autoencoder = build_autoencoder(config)
        self.networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        self.frozen: dict[str, nn.Module] = {} if perceptual is None else {"perceptual": perceptual}
        adaptive = config.discriminator is not None and config.discriminator.adaptive
        self.phases = [
            Phase(
                "autoencoder",
                self.autoencoder_loss,
                # The codebook sums over the batch of all ranks, and the adaptive weight over its gradients.
                couples_samples=adaptive or config.regulariser.kind == "vq",
                double_backward=adaptive,
            )
        ]
        self.latent_mean = torch.zeros(config.latent_channels, dtype=torch.float64)
        self.latent_std = torch.ones((), dtype=torch.float64)
        if config.discriminator is not None:
            self.discriminator = PatchDiscriminator(config.discriminator.channels, config.discriminator.layers)
            self.networks["discriminator"] = self.discriminator
            self.phases.append(
                Phase("discriminator", self.discriminator_loss, start_step=config.discriminator.start_step)
            )

    @staticmethod
    def from_config(config: AutoencoderConfig, inputs: Path | None = None) -> Autoencoder:
        """Build from a configuration; `inputs/perceptual.safetensors` goes before the path that the config names.

        Raises:
            ValueError: the perceptual weights are missing or of another shape.
        """
        perceptual = None
        if config.perceptual is not None:
            staged = None if inputs is None else inputs / "perceptual.safetensors"
            path = staged if staged is not None and staged.is_file() else Path(config.perceptual)
            perceptual = PerceptualDistance.from_file(path)
        return Autoencoder(config, perceptual)

    @staticmethod
    def abstract_networks(config: AutoencoderConfig) -> dict[str, nn.Module]:
        """The trained networks on the meta device, to count parameters."""
        with torch.device("meta"):
            return Autoencoder(config.model_copy(update={"perceptual": None})).networks

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """One pass with a sample of the posterior that comes from the batch's seeds."""
        size = self.config.image_size // self.config.factor
        noise = random.normal(batch["seeds"], (self.config.latent_channels, size, size), "latent")
        return self.autoencoder(batch["images"], noise)

    def autoencoder_loss(self, batch: Batch) -> PhaseLoss:
        """Reconstruction + regulariser + perceptual and, from the discriminator's start on, −D(reconstruction)."""
        result = self.reconstruct(batch)
        terms = self._terms(batch, result)
        per_sample = terms["loss"]
        if isinstance(self.autoencoder, ReconstructingVQ) and result.codes is not None and torch.is_grad_enabled():
            quantiser = self.autoencoder.quantiser
            perplexity = quantiser.update(result.latents, result.codes, batch["weight"], batch["step"])
            terms["perplexity"] = perplexity.expand(len(per_sample))
        if self.config.discriminator is not None:
            adversarial = torch.zeros_like(per_sample)
            if batch["step"] >= self.config.discriminator.start_step:
                adversarial = -self.discriminator(result.images).flatten(1).mean(1)
                factor = torch.ones(())
                if self.config.discriminator.adaptive and torch.is_grad_enabled():
                    factor = self._gradient_ratio(batch["weight"] * per_sample, batch["weight"] * adversarial)
                    terms["adversarial_factor"] = factor.expand(len(per_sample))
                per_sample = per_sample + self.config.discriminator.weight * factor * adversarial
            terms["adversarial"] = adversarial
        metrics = {name: Mean.of(values, batch["weight"]) for name, values in {**terms, "loss": per_sample}.items()}
        return PhaseLoss((batch["weight"] * per_sample).mean(), metrics)

    def _gradient_ratio(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """How much stronger the reconstruction's gradient is at the decoder's last layer: Esser et al. 2021, eq. 7."""
        norms = []
        for per_sample in (reconstruction, adversarial):
            (gradient,) = torch.autograd.grad(per_sample.sum(), self.autoencoder.last_layer, retain_graph=True)
            if dist.is_initialized():
                dist.all_reduce(gradient)
            norms.append(gradient.norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)

    def discriminator_loss(self, batch: Batch) -> PhaseLoss:
        """Hinge loss of real images against reconstructions, which pass no gradient on."""
        with torch.no_grad():
            fake_images = self.reconstruct(batch).images
        real, fake = self.discriminator(batch["images"]), self.discriminator(fake_images)
        per_sample = hinge_loss(real, fake)
        metrics = {
            "discriminator_loss": Mean.of(per_sample, batch["weight"]),
            "score_real": Mean.of(real.flatten(1).mean(1), batch["weight"]),
            "score_fake": Mean.of(fake.flatten(1).mean(1), batch["weight"]),
        }
        return PhaseLoss((batch["weight"] * per_sample).mean(), metrics)

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """`loss` without the adversarial term, `l1`, `psnr` in dB, and `kl` in nats per image or `commitment`."""
        result = self.reconstruct(batch)
        terms = self._terms(batch, result)
        terms["psnr"] = _decibels(result.images, batch["images"])
        return {name: Mean.of(values, batch["weight"]) for name, values in terms.items()}

    def preview(self, batch: Batch) -> Preview:
        """Eight held-out images, each beside its reconstruction."""
        images = batch["images"][:8]
        result = self.autoencoder(images).images.clamp(-1, 1)
        pairs = torch.stack([images, result], dim=1).flatten(0, 1)
        return Preview(pairs, ["image", "reconstruction"] * len(images))

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Measure the latents: the mean of each channel, and the deviation from it over all channels.

        The export's latents have that mean taken off, and the deviation's inverse becomes its `scaling_factor`. Every
        rank must be given the same batches, so that all keep the same figures.

        Raises:
            ValueError: there is no sample in the batches, or all latents are alike.
        """
        channels = self.config.latent_channels
        total = square = torch.zeros(channels, dtype=torch.float64)
        decibels = torch.zeros((), dtype=torch.float64)
        values = samples = 0.0
        for batch in batches:
            result = self.reconstruct(batch)
            weight = batch["weight"].double().cpu()
            latents = result.latents.double().cpu().flatten(2)
            total = total + (weight[:, None] * latents.sum(2)).sum(0)
            square = square + (weight[:, None] * latents.square().sum(2)).sum(0)
            values += float(weight.sum()) * latents.shape[2]
            decibels = decibels + (weight * _decibels(result.images, batch["images"]).double().cpu()).sum()
            samples += float(weight.sum())
        if not samples:
            raise ValueError("the latents' scale cannot be measured: no sample was given")
        mean = total / values
        std = (square / values - mean**2).mean().sqrt()
        if not std > 0:
            raise ValueError(f"the latents' scale cannot be measured: their deviation is {float(std)}")
        self.latent_mean, self.latent_std = mean, std
        return {
            "latent_mean_rms": float(mean.square().mean().sqrt()),
            "latent_std": float(std),
            "reconstruction_psnr": float(decibels / samples),
        }

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before diffusion, so that their deviation is 1."""
        return 1.0 / float(self.latent_std)

    def state_dict(self) -> dict[str, Tensor]:
        """What was measured of the latents; before `finish`, means of 0 and a deviation of 1."""
        return {"latent_mean": self.latent_mean, "latent_std": self.latent_std}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.latent_std = state["latent_std"].double().cpu()
        if "latent_mean" in state:
            self.latent_mean = state["latent_mean"].double().cpu()

    def export(self, folder: Path) -> dict[str, Any]:
        """A diffusers AutoencoderKL or VQModel folder, opened by `from_pretrained`; its latents are centred."""
        self.autoencoder.save(folder, self.scaling_factor, self.latent_mean)
        return {
            "layout": type(self.autoencoder.model).__name__,
            "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in self.networks.items()},
            "scaling_factor": self.scaling_factor,
            "latent_shift": self.latent_mean.tolist(),
            "factor": self.config.factor,
        }

    def load_weights(self, folder: Path) -> None:
        """Start from an AutoencoderKL or VQModel folder, or the `vae/` of a Stable Diffusion folder.

        Raises:
            ValueError: the weights are missing or have other shapes.
        """
        self.autoencoder.load(folder / "vae" if (folder / "vae").is_dir() else folder)

    def flops_per_sample(self) -> float:
        """Of the autoencoder's forward pass; the discriminator's and the perceptual network's are not counted."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        size = self.config.image_size
        return forward_flops(lambda: build_autoencoder(self.config), ((1, 3, size, size), torch.float32))

    def _terms(self, batch: Batch, result: Reconstruction) -> dict[str, Tensor]:
        """Each sample's loss and its parts, (batch,) each."""
        difference = result.images - batch["images"]
        l1 = difference.abs().flatten(1).mean(1)
        error = l1 if self.config.reconstruction == "l1" else difference.square().flatten(1).mean(1)
        regulariser = self.config.regulariser
        if isinstance(regulariser, KlRegulariser):
            loss = error + regulariser.weight * result.penalty / difference[0].numel()
            terms = {"loss": loss, "l1": l1, "kl": result.penalty}
        else:
            loss = error + regulariser.commitment_weight * result.penalty
            terms = {"loss": loss, "l1": l1, "commitment": result.penalty}
        if "perceptual" in self.frozen:
            terms["perceptual"] = self.frozen["perceptual"](result.images, batch["images"])
            terms["loss"] = terms["loss"] + self.config.perceptual_weight * terms["perceptual"]
        return terms


def build_autoencoder(config: AutoencoderConfig) -> ReconstructingAutoencoder | ReconstructingVQ:
    """A freshly initialised autoencoder."""
    blocks = len(config.channels)
    common: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": tuple(config.channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": config.image_size,
        "scaling_factor": 1.0,
    }
    chosen = config.regulariser
    if isinstance(chosen, KlRegulariser):
        return ReconstructingAutoencoder(AutoencoderKL(**common))
    quantiser = VectorQuantiser(
        chosen.codebook_size, config.latent_channels, chosen.codebook_decay, chosen.revive_below
    )
    return ReconstructingVQ(VQModel(**common, num_vq_embeddings=chosen.codebook_size), quantiser)


def _decibels(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (batch,) of what can be shown, at most 100 dB: equal images would be infinite."""
    return psnr(images.clamp(-1, 1), references).clamp(max=100)
