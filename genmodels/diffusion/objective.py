"""The training objective of (latent) diffusion models, with or without text.

Ho et al. 2020, eq. 14, in the latents of an autoencoder as in Rombach et al., "High-Resolution Image Synthesis with
Latent Diffusion Models" (CVPR 2022), eq. 3; captions are dropped for classifier-free guidance (Ho and Salimans 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5EncoderModel

from genmodels import random
from genmodels.autoencoder.codec import LatentCodec
from genmodels.clip.frozen import FrozenClip, fit
from genmodels.diffusion import lora
from genmodels.diffusion.build import build_denoiser
from genmodels.diffusion.config import LatentDiffusionConfig, LowResolutionCondition, UNetConfig
from genmodels.diffusion.degradation import random_crops
from genmodels.diffusion.dit import DiT, load_dit
from genmodels.diffusion.image_condition import augmented, condition_channels, fold, from_batch
from genmodels.diffusion.learned_variance import BOUND_WEIGHT, variational_bound
from genmodels.diffusion.network import (
    ConditionalDenoiser,
    example_flops,
    load_projection,
    told_embedding,
)
from genmodels.diffusion.noise_schedule import DiffusionSchedule, NoiseSchedule
from genmodels.diffusion.sampler import Condition, Guidance, make_sampler, sample, sampler_settings
from genmodels.objective import Batch, Drawing, Mean, Objective, Phase, PhaseLoss, Preview, once
from genmodels.text.config import PretrainedTextEncoder
from genmodels.text.encoder import TextEncoder, open_text_encoder, read_text
from genmodels.text.tokenizer import encode
from genmodels.text.tokenizer import load as load_tokenizer
from genmodels.weights import load_into, required_folder

TIMESTEP_BINS = 4
PREVIEW_SEED = 1234


class LatentDiffusion(Objective):
    """Denoising of latents or pixels; one network ("denoiser"), one phase.

    All randomness comes from `batch["seeds"]`: the posterior's sample, timesteps, noise and the dropped captions.
    """

    def __init__(
        self,
        config: LatentDiffusionConfig,
        denoiser: ConditionalDenoiser,
        autoencoder: LatentCodec | None = None,
        text_encoder: TextEncoder | None = None,
        tokenizer: CLIPTokenizer | None = None,
        clip: FrozenClip | None = None,
    ) -> None:
        """Args: `text_encoder` is the frozen one, if any; one that is trained along is part of `denoiser`. `clip`
        embeds the images where the config has an `image_embedding`."""
        self.config = config
        self.denoiser = denoiser
        self.tokenizer = tokenizer
        self.networks: dict[str, nn.Module] = {"denoiser": denoiser}
        self.frozen: dict[str, nn.Module] = {
            name: network.eval().requires_grad_(False)
            for name, network in (("autoencoder", autoencoder), ("text_encoder", text_encoder), ("clip", clip))
            if network is not None
        }
        self.trained = {} if config.lora is None else {"denoiser": lora.TRAINED}
        self.phases = [Phase("denoiser", self.loss)]
        self.noise_schedule = NoiseSchedule.named(
            config.noise_schedule,
            config.train_timesteps,
            config.zero_terminal_snr,
            config.flow_shift,
            sigma_data=config.sigma_data,
            mean=config.edm_mean,
            std=config.edm_std,
        )
        self.empty_ids = None if tokenizer is None else encode(tokenizer, [""])  # (1, length)

    @property
    def autoencoder(self) -> LatentCodec | None:
        """Makes latents of images, and images of latents; None where pixels are diffused."""
        return self.frozen.get("autoencoder")  # type: ignore[return-value]

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The frozen one."""
        return self.frozen.get("text_encoder")  # type: ignore[return-value]

    @property
    def clip(self) -> FrozenClip | None:
        """Whose image embeddings the denoiser is told."""
        return self.frozen.get("clip")  # type: ignore[return-value]

    @staticmethod
    def from_config(config: LatentDiffusionConfig, inputs: Path | None = None) -> LatentDiffusion:
        """Build from a configuration.

        Args:
            config: what to build.
            inputs: folder that holds `autoencoder/` (an AutoencoderKL or VQModel of diffusers), `tokenizer/`, and
                `text_encoder/` where it is pretrained, and `clip/` where the image's embedding is told.

        Raises:
            ValueError: an input is missing or does not fit; the message names it.
        """
        autoencoder = tokenizer = frozen_text = clip = None
        if config.autoencoder is not None:
            autoencoder = LatentCodec.from_folder(required_folder(inputs, "autoencoder"))
        if config.takes_text:
            tokenizer = load_tokenizer(required_folder(inputs, "tokenizer"))
        if isinstance(config.text_encoder, PretrainedTextEncoder):
            folder = required_folder(inputs, "text_encoder")
            frozen_text = open_text_encoder(folder)
            unet = config.denoiser if isinstance(config.denoiser, UNetConfig) else None
            if isinstance(frozen_text, T5EncoderModel) and (unet is None or unet.pooled_text):
                raise ValueError(
                    "a T5's padding must not be seen, which denoiser.kind unet without pooled_text alone takes care of"
                )
        if config.image_embedding is not None:
            clip = FrozenClip.from_folder(required_folder(inputs, "clip"))
        denoiser = build_denoiser(config, autoencoder, frozen_text, tokenizer, clip)
        return LatentDiffusion(config, denoiser, autoencoder, frozen_text, tokenizer, clip)

    @staticmethod
    def abstract_networks(config: LatentDiffusionConfig) -> dict[str, nn.Module]:
        """The trained networks on the meta device, to count parameters before any input is at hand."""
        with torch.device("meta"):
            return {"denoiser": build_denoiser(config)}

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Latents, features of the text and embeddings of the images."""
        for batch in batches:
            self.latents(self.view(batch))
            if self.config.takes_text or self.config.image_embedding is not None:
                self.condition(self.view(batch), dropout=True)

    def loss(self, batch: Batch) -> PhaseLoss:
        """Mean over the slots of w ‖prediction − target‖²; w = 0 for quarantined samples, else 1 or the min-SNR weight.

        A learned variance adds its bound. Logged are the plain errors, all as `loss` and by timestep, and the bound.
        """
        batch = self.view(batch)
        timesteps = self.noise_schedule.timesteps(self._positions(batch["seeds"]))
        condition = self.condition(batch, dropout=True)
        per_sample, bound = self._errors(batch, self.latents(batch), timesteps, condition)
        logged = {"loss": Mean.of(per_sample, batch["weight"]), **self._by_timestep(per_sample, timesteps, batch)}
        if self.config.min_snr_gamma is not None:
            per_sample = per_sample * self.noise_schedule.min_snr_weight(
                self.config.prediction_type, timesteps, self.config.min_snr_gamma
            )
        if bound is not None:
            logged["variational_bound"] = Mean.of(bound, batch["weight"])
            per_sample = per_sample + BOUND_WEIGHT * self.config.train_timesteps * bound
        # The mean is over slots, not over Σw: it weighs a sample the same at every world size.
        return PhaseLoss((batch["weight"] * per_sample).mean(), logged)

    def validate(self, batch: Batch) -> dict[str, Mean]:
        """The loss with no caption dropped, each sample at one timestep in each quarter of the schedule."""
        batch = self.view(batch)
        latents, condition = self.latents(batch), self.condition(batch, dropout=False)
        position = random.uniform(batch["seeds"], (), "timesteps")
        parts = []
        for quarter in range(TIMESTEP_BINS):
            timesteps = self.noise_schedule.timesteps((quarter + position) / TIMESTEP_BINS)
            per_sample, _ = self._errors(batch, latents, timesteps, condition)
            parts.append(
                {"loss": Mean.of(per_sample, batch["weight"]), **self._by_timestep(per_sample, timesteps, batch)}
            )
        return {
            name: Mean(sum(part[name].total for part in parts), sum(part[name].count for part in parts))  # type: ignore[arg-type]
            for name in parts[0]
        }

    def view(self, batch: Batch) -> Batch:
        """The batch as the denoiser is trained on it: on crops, where the configuration asks for them."""
        told = self.config.image_condition
        if not isinstance(told, LowResolutionCondition) or told.crop is None:
            return batch
        size, images, seeds = told.crop, self.images(batch), batch["seeds"]
        cropped = once(
            batch,
            ("crops", size, told.factor),
            (images, seeds),
            lambda: {**batch, "images": random_crops(images, seeds, size, told.factor), "once": {}},
        )
        return cropped

    def images(self, batch: Batch) -> Tensor:
        """The images at the size that is trained: a CLIP may see them larger."""
        images = batch["images"]
        if self.config.image_embedding is None or images.shape[-1] == self.config.image_size:
            return images
        return once(batch, ("images", self.config.image_size), (images,), lambda: fit(images, self.config.image_size))

    def latents(self, batch: Batch) -> Tensor:
        """What is diffused: scaled latents of the autoencoder, or the images themselves."""
        codec = self.autoencoder
        if codec is None:
            return self.images(batch)
        seeds = batch["seeds"]
        if self.config.latent_member is not None:
            moments = batch["latent_moments"]
            return once(batch, ("latents", codec), (moments, seeds), lambda: codec.from_moments(moments, seeds))
        images = self.images(batch)
        return once(batch, ("latents", codec), (images, seeds), lambda: codec.encode(images, seeds))

    def condition(self, batch: Batch, dropout: bool) -> Condition:
        """What the denoiser is told; with `dropout`, by their seeds, some samples are not told of one or the other."""
        seeds = batch["seeds"]
        told: dict[str, Tensor] = {}
        dropped = random.uniform(seeds, (), "dropout") < (self.config.condition_dropout if dropout else 0.0)
        if self.config.classes is not None:
            told["classes"] = torch.where(dropped, len(self.config.classes), self.labels(batch))
        elif self.config.takes_text:
            token_ids = batch["token_ids"]
            told |= once(
                batch,
                ("text", self.text_encoder, dropout and self.config.condition_dropout),
                (token_ids, seeds),
                lambda: self.read_text(torch.where(dropped[:, None], self._empty(token_ids), token_ids)),
            )
        if self.config.size_conditioning:
            told["size"] = batch["sizes"]
        if self.config.image_condition is not None:
            image = fold(from_batch(self.config.image_condition, {**batch, "images": self.images(batch)}), self.factor)
            if self.config.tells_level:
                told["level"] = self._levels(seeds)
            if dropout and self.config.image_condition.dropout > 0:
                kept = random.uniform(seeds, (), "image dropout") >= self.config.image_condition.dropout
                image = image * kept[:, None, None, None]
            told["image"] = image
        if self.config.image_embedding is not None:
            known = torch.ones_like(seeds, dtype=torch.bool)
            if dropout:
                known = random.uniform(seeds, (), "embedding dropout") >= self.config.image_embedding.dropout
            told["embedding"] = told_embedding(self.embeddings(batch), known)
        return told

    def embeddings(self, batch: Batch) -> Tensor:
        """Embeddings of the images, float32 (batch, embedding_dim): unit vectors."""
        clip, config = self.clip, self.config.image_embedding
        assert clip is not None and config is not None
        if config.member is not None:
            return batch["image_embeddings"].float()
        images = batch["images"]
        return once(batch, ("clip images", clip), (images,), lambda: clip.embed_images(images))

    def _levels(self, seeds: Tensor) -> Tensor:
        """How noisy the image is that each sample is told, float32 (batch,) from 0 to 1."""
        told = self.config.image_condition
        assert isinstance(told, LowResolutionCondition)
        empty = torch.zeros(len(seeds), 0, 1, 1, device=seeds.device)
        return augmented(told, empty, seeds)[1].float()

    def nothing(self, batch: Batch) -> Condition:
        """The condition of samples that are not told what samples are trained without."""
        told: dict[str, Tensor] = {}
        if self.config.classes is not None:
            told["classes"] = torch.full_like(batch["seeds"], len(self.config.classes))
        elif self.config.takes_text:
            told |= self.read_text(self._empty(batch["token_ids"]).expand_as(batch["token_ids"]))
        if self.config.image_condition is not None and self.config.image_condition.dropout > 0:
            _, *sides = self.denoiser.sample_shape
            channels = condition_channels(self.config.image_condition, self.factor)
            told["image"] = torch.zeros(len(batch["seeds"]), channels, *sides, device=batch["seeds"].device)
        if self.clip is not None:
            told["embedding"] = torch.zeros(
                len(batch["seeds"]), self.clip.embedding_dim + 1, device=batch["seeds"].device
            )
        return told

    @property
    def factor(self) -> int:
        """Pixels a side that one latent stands for."""
        return 1 if self.autoencoder is None else self.autoencoder.factor

    def labels(self, batch: Batch) -> Tensor:
        """Labels int64 (batch,) of captions that name classes; none for quarantined samples, which have no caption.

        Raises:
            ValueError: a caption names no class.
        """
        assert self.config.classes is not None
        known = {name: label for label, name in enumerate(self.config.classes)}
        found = []
        for caption, key, weight in zip(batch["captions"], batch["keys"], batch["weight"].tolist()):
            if weight and caption not in known:
                raise ValueError(f"{key}: caption {caption!r} is not one of objective.classes")
            found.append(known.get(caption, len(known)))
        return torch.tensor(found, device=batch["seeds"].device)

    def read_text(self, token_ids: Tensor) -> dict[str, Tensor]:
        """What the frozen text encoder makes of captions; token ids as they are where the denoiser holds its own."""
        if self.text_encoder is None:
            return {"text": token_ids}
        with torch.no_grad():
            return read_text(self.text_encoder, token_ids)

    def preview(self, batch: Batch) -> Preview:
        """Drawn from the captions of the batch, with fixed seeds, by DDIM."""
        count = min(self.config.preview_samples, len(batch["keys"]))
        first = {key: value[:count] for key, value in batch.items() if isinstance(value, (Tensor, list))}
        first["seeds"] = torch.arange(PREVIEW_SEED, PREVIEW_SEED + count, device=batch["seeds"].device)
        drawing = Drawing(self.config.preview_steps, self.config.preview_guidance_scale)
        titles = list(batch["captions"][:count]) if self.config.conditional else []
        return Preview(self.draw(first, drawing), titles)

    def draw(self, batch: Batch, drawing: Drawing) -> Tensor:
        """A picture for each sample, from its conditions and its seed."""
        latents = sample(
            self.denoiser,
            self.denoiser.sample_shape,
            batch["seeds"],
            make_sampler(drawing.sampler, self.sampler_settings),
            min(drawing.num_steps, self.config.train_timesteps - 1),
            self.condition(batch, dropout=False),
            self.nothing(batch),
            Guidance(drawing.guidance_scale),
        )
        return self.decode(latents).clamp(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents (batch, channels, height, width), nominally in [-1, 1]."""
        return latents if self.autoencoder is None else self.autoencoder.decode(latents)

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the model in the layout that `layout_of` names; returns that name and the parameter counts."""
        from genmodels.diffusion.export import export_diffusion, layout_of

        export_diffusion(self, folder)
        return {
            "layout": layout_of(self),
            "parameters": {
                name: sum(p.numel() for p in network.parameters())
                for name, network in {**self.networks, **self.frozen}.items()
            },
        }

    def load_weights(self, folder: Path) -> None:
        """Start from an export: its `unet/` or `transformer/` and, where it is trained along, its `text_encoder/`.

        Raises:
            ValueError: a part is missing or has other shapes.
        """
        plain = self.plain_backbone()
        if isinstance(plain, DiT):
            load_dit(plain, folder / "transformer")
        else:
            load_into(plain, folder / "unet")
        if self.config.lora is not None:
            for name, value in lora.without_adapters(self.denoiser.backbone).items():
                value.copy_(plain.state_dict()[name])
        if self.denoiser.text_encoder is not None:
            load_into(self.denoiser.text_encoder, folder / "text_encoder")
        if self.denoiser.image_projection is not None:
            projection = self.denoiser.image_projection
            own = projection.mean.clone(), projection.deviation.clone()  # of this run's CLIP
            load_projection(projection, folder / "image_projection")
            projection.mean.copy_(own[0])
            projection.deviation.copy_(own[1])

    def plain_backbone(self) -> Any:
        """The U-Net or transformer as others know it: adapters, if any, are added to the weights."""
        if self.config.lora is None:
            return self.denoiser.backbone
        config = self.config.model_copy(update={"lora": None})
        plain = build_denoiser(config, self.autoencoder, self.text_encoder, self.tokenizer, self.clip).backbone
        plain.load_state_dict(lora.merged(self.denoiser.backbone))
        return plain

    def flops_per_sample(self) -> float:
        """Of the denoiser's forward pass; the frozen networks are not counted."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        features = None
        if self.text_encoder is not None:
            assert self.tokenizer is not None
            features = (self.tokenizer.model_max_length, self.text_encoder.config.hidden_size)
        return example_flops(
            lambda: build_denoiser(self.config, self.autoencoder, self.text_encoder, self.tokenizer, self.clip),
            features,
            self.config.classes is not None,
            self.config.image_condition.crop
            if isinstance(self.config.image_condition, LowResolutionCondition)
            else None,
        )

    @property
    def sampler_settings(self) -> dict[str, Any]:
        """What training fixes of a sampler, as diffusers names it. Pixels are clipped to [-1, 1], latents are not."""
        return sampler_settings(
            self.config.noise_schedule,
            self.config.prediction_type,
            self.config.train_timesteps,
            clip=self.config.autoencoder is None,
            zero_terminal_snr=self.config.zero_terminal_snr,
            flow_shift=self.config.flow_shift,
            sigma_data=self.config.sigma_data,
            learned_variance=self.config.learned_variance,
            dynamic_thresholding=self.config.dynamic_thresholding,
        )

    def _positions(self, seeds: Tensor) -> Tensor:
        """Where in the schedule to train, float64 (batch,) in (0, 1): 1 is noise.

        The logit-normal density is that of Esser et al., "Scaling Rectified Flow Transformers" (ICML 2024), eq. 19.
        """
        config = self.config
        if config.timestep_sampling == "logit_normal":
            normal = random.normal(seeds, (), "timesteps", torch.float64)
            return torch.sigmoid(config.logit_mean + config.logit_std * normal)
        return random.uniform(seeds, (), "timesteps") ** (1 / config.timestep_bias)

    def _errors(
        self, batch: Batch, latents: Tensor, timesteps: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """Mean squared error of each sample's prediction, float32 (batch,); and the bound of a learned variance."""
        noise = random.normal(batch["seeds"], latents.shape[1:], "noise")
        if self.config.offset_noise > 0:
            offset = random.normal(batch["seeds"], (latents.shape[1], 1, 1), "offset")
            noise = noise + self.config.offset_noise * offset
        noisy = self.noise_schedule.q_sample(latents, timesteps, noise)
        target = self.noise_schedule.target(self.config.prediction_type, latents, noise, timesteps)
        prediction, bound = self.denoiser(noisy, timesteps, condition), None
        if isinstance(self.noise_schedule, DiffusionSchedule) and self.config.learned_variance:
            prediction, variance = prediction.chunk(2, dim=1)
            kind = self.config.prediction_type
            bound = variational_bound(
                self.noise_schedule, kind, prediction.detach(), variance, latents, noisy, timesteps
            )
        return (prediction - target).square().flatten(1).mean(1), bound

    def _by_timestep(self, per_sample: Tensor, timesteps: Tensor, batch: Batch) -> dict[str, Mean]:
        bins = (self.noise_schedule.position(timesteps) * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1)
        return {f"loss_t{k}": Mean.of(per_sample, batch["weight"] * (bins == k)) for k in range(TIMESTEP_BINS)}

    def _empty(self, like: Tensor) -> Tensor:
        if self.empty_ids is None:
            raise ValueError("replacing captions by the empty one needs the tokenizer")
        return self.empty_ids.to(like.device)
