"""Drawing pictures with a trained diffusion model, from a folder to 8-bit pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from pydantic import TypeAdapter
from torch import Tensor
from transformers import CLIPTokenizer

from genmodels.autoencoder.codec import LatentCodec
from genmodels.clip.frozen import FrozenClip
from genmodels.diffusion.config import ImageConditionConfig, LowResolutionCondition
from genmodels.diffusion.dit import open_dit
from genmodels.diffusion.image_condition import fold, from_given
from genmodels.diffusion.layout import class_names, own_index
from genmodels.diffusion.network import ConditionalDenoiser, open_projection, told_embedding
from genmodels.diffusion.sampler import NOTHING, Condition, Guidance, SamplerName, make_sampler, sample
from genmodels.precision import autocast, resolve_precision
from genmodels.text.encoder import open_text_encoder, read_text
from genmodels.text.tokenizer import encode
from genmodels.text.tokenizer import load as load_tokenizer

UNETS: dict[str, type] = {"UNet2DConditionModel": UNet2DConditionModel, "UNet2DModel": UNet2DModel}


class TextToImage:
    """A diffusion model that draws; a picture depends on its prompt and seed, not on the batch it was drawn in.

    Example:
        >>> model = TextToImage.from_folder(Path("export"))  # doctest: +SKIP
        >>> model.draw(["a red seven on a white background"], seeds=[1]).shape  # doctest: +SKIP
        (1, 32, 32, 3)
    """

    def __init__(
        self,
        denoiser: ConditionalDenoiser,
        sampler_settings: dict[str, Any],
        autoencoder: LatentCodec | None = None,
        tokenizer: CLIPTokenizer | None = None,
        precision: str = "fp32",
        classes: list[str] | None = None,
        image_condition: ImageConditionConfig | None = None,
        clip: FrozenClip | None = None,
    ) -> None:
        """Args: a model with a tokenizer draws from text, and `denoiser` holds its encoder; one with `classes` from
        their names; `clip` embeds images for one that is told embeddings."""
        self.precision = resolve_precision(precision, next(denoiser.parameters()).device)
        self.denoiser = denoiser
        self.sampler_settings = sampler_settings
        self.autoencoder = autoencoder
        self.tokenizer = tokenizer
        self.classes = classes
        self.image_condition = image_condition
        self.clip = clip

    @staticmethod
    def from_folder(
        folder: Path, device: str = "cpu", precision: str = "fp32", clip: FrozenClip | None = None
    ) -> TextToImage:
        """Open an export of this project, or any folder in the layout of Stable Diffusion, DiTPipeline or DDPMPipeline.

        Args:
            folder: local folder.
            device: where to draw.
            precision: of the U-Net's products: "fp32", "bf16" (a little off the float32 pictures), or "auto": bf16
                where the device is fast at it.
            clip: in place of the folder's own, which may then be left out.

        Raises:
            ValueError: a part is missing or the precision unknown; the message names it.
        """
        folder = Path(folder)
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        classes = class_names(folder)
        backbone: Any
        if (folder / "transformer" / "config.json").is_file():
            backbone = open_dit(folder / "transformer", None if classes is None else len(classes))
        elif (folder / "unet" / "config.json").is_file():
            name = json.loads((folder / "unet" / "config.json").read_text())["_class_name"]
            if name not in UNETS:
                raise ValueError(f"{folder}/unet is a {name}; {' and '.join(UNETS)} can be drawn with")
            backbone = UNETS[name].from_pretrained(folder / "unet", **options)  # type: ignore[attr-defined]
        else:
            raise ValueError(f"{folder} is no diffusion model: there is no unet/ or transformer/config.json")
        text_encoder = tokenizer = autoencoder = None
        if (folder / "tokenizer").is_dir():
            text_encoder = open_text_encoder(folder / "text_encoder")
            tokenizer = load_tokenizer(folder / "tokenizer")
        if (folder / "vae").is_dir():
            autoencoder = LatentCodec.from_folder(folder / "vae").to(device)
        settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        channels = 3 if autoencoder is None else autoencoder.channels
        learned_variance = backbone.config.out_channels == 2 * channels
        index, projection = own_index(folder), None
        if "image_embedding" in index:
            projection = open_projection(folder / "image_projection", index["image_embedding"]["tokens"])
            clip = clip or FrozenClip.from_folder(folder / "clip").to(device)
        skip_scale = index.get("skip_scale", 1.0)
        denoiser = ConditionalDenoiser(backbone, text_encoder, learned_variance, projection, skip_scale)
        told = TypeAdapter(ImageConditionConfig | None).validate_python(index.get("image_condition"))
        return TextToImage(denoiser.to(device).eval(), settings, autoencoder, tokenizer, precision, classes, told, clip)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        factor = 1 if self.autoencoder is None else self.autoencoder.factor
        return self.denoiser.sample_shape[-1] * factor

    @property
    def given_size(self) -> int:
        """Height and width of the image that it is told; 0 where it is told none."""
        if self.image_condition is None:
            return 0
        reduced = self.image_condition.factor if isinstance(self.image_condition, LowResolutionCondition) else 1
        return self.image_size // reduced

    @property
    def takes_mask(self) -> bool:
        """Whether it fills in what a mask says."""
        return self.image_condition is not None and self.image_condition.kind == "mask"

    @property
    def takes_map(self) -> bool:
        """Whether the image that it is told is of another kind, such as a semantic map, whose colours are not mixed."""
        return self.image_condition is not None and self.image_condition.kind == "member"

    @property
    def takes_embedding(self) -> bool:
        """Whether it is told the embedding of an image: the decoder of unCLIP."""
        return self.denoiser.image_projection is not None

    @property
    def conditional(self) -> bool:
        """Whether it draws from prompts: texts, or names of classes."""
        return self.tokenizer is not None or self.classes is not None

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        num_steps: int = 20,
        guidance_scale: float = 2.0,
        sampler: SamplerName = "ddim",
        batch_size: int = 64,
        progress: Callable[[float, int], None] | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        images: np.ndarray | None = None,
        masks: np.ndarray | None = None,
        embeddings: Tensor | None = None,
        augmentation_level: float = 0.0,
    ) -> np.ndarray:
        """Draw one picture per prompt and seed.

        Args:
            prompts: one per picture, a text or the name of a class; None for an unconditional model.
            seeds: one per picture.
            negative_prompts: one per picture, what to steer away from; None is the empty text, or no class.
            num_steps: denoising steps.
            guidance_scale: 1 is the conditional model; more follows the prompt more closely.
            sampler: ddpm, ddim, dpm_solver++, euler, heun or euler_ancestral; see `make_sampler`.
            batch_size: pictures drawn together; it changes speed and memory, not the pictures.
            progress: called after each step with the pictures drawn so far (fractions count) and their total.
            eta: of ddim, 0 … 1: how much of each step's noise is drawn anew.
            guidance_rescale, guidance_interval: see `Guidance`.
            images: one per picture for a model that is told one: uint8 (pictures, height, width, 3); see `from_given`.
            masks: one per picture for inpainting: bool (pictures, height, width), true where it is to be filled in. All
                else is the given image's, to the bit.
            embeddings: one per picture for the decoder of unCLIP, (pictures, embedding_dim); None tells it none.
            augmentation_level: of noise that is put on `images` by a model that was trained so, 0 to 1.

        Returns:
            uint8 (pictures, height, width, 3).

        Raises:
            ValueError: prompts, negative prompts and seeds differ in number, prompts are given to an unconditional
                model or missing for a conditional one, or a setting of the sampler or the guidance is not possible.
        """
        if self.conditional and len(prompts or ()) != len(seeds):
            raise ValueError(f"needs one prompt per seed: {len(prompts or ())} for {len(seeds)} seeds")
        if not self.conditional and (prompts or negative_prompts):
            raise ValueError("this model is unconditional: it takes seeds, and no prompts")
        if negative_prompts is not None and len(negative_prompts) != len(seeds):
            raise ValueError(f"needs one negative prompt per seed: {len(negative_prompts)} for {len(seeds)} seeds")
        self._check_given(images, masks, len(seeds))
        if embeddings is not None and not self.takes_embedding:
            raise ValueError("this model is told no embeddings of images")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be 1 or more")
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        pictures = [np.empty((0, self.image_size, self.image_size, 3), dtype=np.uint8)]
        for start in range(0, len(seeds), batch_size):
            part = slice(start, min(start + batch_size, len(seeds)))
            condition, negative = self.conditions(
                None if prompts is None else prompts[part],
                None if negative_prompts is None else negative_prompts[part],
                len(seeds[part]),
                None if embeddings is None else embeddings[part],
            )
            if self.image_condition is not None and images is not None:
                own = self.seeds(seeds[part])
                told = self._image(images[part], None if masks is None else masks[part], augmentation_level, own)
                condition["image"] = told
                if self.denoiser.takes_level:
                    condition["level"] = torch.full((len(own),), augmentation_level, device=self._device)
                if self.image_condition.dropout > 0:
                    negative["image"] = torch.zeros_like(condition["image"])

            def on_step(done: float, part: slice = part) -> None:
                if progress is not None:
                    progress(part.start + (part.stop - part.start) * done / num_steps, len(seeds))

            stepper = make_sampler(sampler, self.sampler_settings, eta)
            latents = self.sample(seeds[part], stepper, num_steps, condition, negative, guidance, on_step)
            pictures.append(to_pixels(latents if self.autoencoder is None else self.autoencoder.decode(latents)))
        drawn = np.concatenate(pictures)
        return drawn if masks is None or images is None else np.where(masks[..., None], drawn, images)

    def _check_given(self, images: np.ndarray | None, masks: np.ndarray | None, count: int) -> None:
        """Raises ValueError where what is given is not what the model is told."""
        if (images is not None) != (self.image_condition is not None):
            kind = "no images" if self.image_condition is None else f"images ({self.image_condition.kind})"
            raise ValueError(f"this model takes {kind} to draw from")
        if self.image_condition is None or images is None:
            return
        size = self.given_size
        if images.shape[:3] != (count, size, size):
            raise ValueError(f"needs {count} images of {size} by {size} pixels, got {images.shape}")
        if (masks is not None) != self.takes_mask:
            raise ValueError(f"a model of kind {self.image_condition.kind} takes {'a' if masks is None else 'no'} mask")
        if masks is not None and masks.shape != (count, size, size):
            raise ValueError(f"needs {count} masks of {size} by {size} pixels, got {masks.shape}")

    def conditions(
        self,
        prompts: Sequence[str] | None,
        negative_prompts: Sequence[str] | None,
        count: int,
        embeddings: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the denoiser is told, and what it is steered away from, but for images; see `draw`."""
        condition, negative = dict(NOTHING), dict(NOTHING)
        if prompts is not None:
            condition |= self._condition(prompts)
            negative |= self._condition([""] * count if negative_prompts is None else negative_prompts)
        if self.denoiser.takes_size:  # as of an image of this very size
            size = torch.tensor([[self.image_size, self.image_size, 0, 0]], device=self._device)
            condition["size"] = size.expand(count, -1)
        if self.denoiser.image_projection is not None:
            features = len(self.denoiser.image_projection.mean)
            if embeddings is not None and embeddings.shape != (count, features):
                raise ValueError(f"needs {count} embeddings of {features} features, got {tuple(embeddings.shape)}")
            nothing = torch.zeros(count, features + 1, device=self._device)
            condition["embedding"] = nothing if embeddings is None else told_embedding(embeddings.to(nothing))
            negative["embedding"] = nothing
        return condition, negative

    def seeds(self, seeds: Sequence[int]) -> Tensor:
        """Seeds on the device."""
        return torch.tensor(list(seeds), dtype=torch.int64, device=self._device)

    def _image(self, images: np.ndarray, masks: np.ndarray | None, level: float, seeds: Tensor) -> Tensor:
        """What the denoiser is told of given images, folded to the latents' grid."""
        assert self.image_condition is not None
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        holes = None if masks is None else torch.from_numpy(masks).to(self._device)[:, None].float()
        factor = 1 if self.autoencoder is None else self.autoencoder.factor
        return fold(from_given(self.image_condition, pixels, holes, level, seeds), factor)

    @torch.inference_mode()
    def sample(
        self,
        seeds: Sequence[int],
        sampler: Any,
        num_steps: int,
        condition: Condition,
        negative: Condition,
        guidance: Guidance,
        on_step: Callable[[float], None] | None = None,
        stop: float = 0.0,
    ) -> Tensor:
        """Latents, or images where pixels are diffused, float32 (len(seeds), channels, height, width).

        Args:
            seeds: one per picture.
            sampler: a fresh one of `make_sampler`.
            num_steps, guidance: as of `draw`.
            condition, negative: of `conditions`, and the image that is told, if any.
            on_step: called with the number of steps done.
            stop: where in the schedule to end, 0 is clean and 1 noise; see `sampler.sample`.
        """
        shape = self.denoiser.sample_shape
        return sample(
            self._denoise,
            shape,
            self.seeds(seeds),
            sampler,
            num_steps,
            condition,
            negative,
            guidance,
            on_step,
            stop=stop,
        )

    @property
    def _device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def _condition(self, prompts: Sequence[str]) -> Condition:
        """Labels, or the text encoder's output: once per picture rather than once per step."""
        if self.classes is not None:
            known = {"": len(self.classes), **{name: label for label, name in enumerate(self.classes)}}
            if unknown := [prompt for prompt in prompts if prompt not in known]:
                raise ValueError(f"{unknown[0]!r} is no class of this model; it has {', '.join(self.classes[:20])}")
            return {"classes": torch.tensor([known[prompt] for prompt in prompts], device=self._device)}
        assert self.tokenizer is not None and self.denoiser.text_encoder is not None
        token_ids = encode(self.tokenizer, list(prompts)).to(self._device)
        return read_text(self.denoiser.text_encoder, token_ids)

    def _denoise(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        with autocast(self.precision, latents.device):
            return self.denoiser.predict(latents, timesteps, condition)


def to_pixels(images: Tensor) -> np.ndarray:
    """8-bit pixels, uint8 (batch, height, width, channels), of images (batch, channels, height, width) in [-1, 1]."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
