"""Drawing with an exported GAN: one pass from a latent to a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from genmodels import random
from genmodels.clip.frozen import FrozenClip
from genmodels.diffusion.pipeline import to_pixels
from genmodels.gan.build import build_generator
from genmodels.gan.config import GanConfig
from genmodels.gan.export import read_index, read_networks
from genmodels.precision import autocast, resolve_precision
from genmodels.random import derive_seeds
from genmodels.text.encoder import TextEncoder, open_text_encoder, pooled_text
from genmodels.text.tokenizer import encode
from genmodels.text.tokenizer import load as load_tokenizer


class GanModel:
    """The generator of an export, with what reads its prompts. A picture depends on its prompt and seed alone.

    Example:
        >>> model = GanModel.from_folder(Path("export"))  # doctest: +SKIP
        >>> model.draw(["a red seven on a white background"], seeds=[1]).shape  # doctest: +SKIP
        (1, 32, 32, 3)
    """

    takes_mask = takes_map = takes_embedding = False
    given_size, image_condition = 0, None

    def __init__(
        self,
        config: GanConfig,
        generator: nn.Module,
        text_encoder: TextEncoder | None = None,
        tokenizer: CLIPTokenizer | None = None,
        precision: str = "fp32",
        clip: FrozenClip | None = None,
    ) -> None:
        self.config, self.generator, self.precision, self.clip = config, generator.eval(), precision, clip
        self.text_encoder, self.tokenizer, self.classes = text_encoder, tokenizer, config.classes

    @staticmethod
    def from_folder(folder: Path, device: str = "cpu", precision: str = "fp32") -> GanModel:
        """Open what `Gan.export` wrote. Raises ValueError where a part is missing or the precision unknown."""
        config = GanConfig.model_validate(read_index(folder)["config"])
        text_encoder = tokenizer = width = clip = None
        if config.clip is not None:
            clip = FrozenClip.from_folder(folder / "clip").to(device)
            tokenizer, width = clip.tokenizer, clip.embedding_dim
        elif config.takes_text:
            text_encoder = open_text_encoder(folder / "text_encoder").to(device)  # type: ignore[arg-type]
            tokenizer, width = load_tokenizer(folder / "tokenizer"), int(text_encoder.config.hidden_size)
        generator = build_generator(config, width)
        read_networks(folder, {"generator": generator})
        precision = resolve_precision(precision, torch.device(device))
        return GanModel(config, generator.to(device), text_encoder, tokenizer, precision, clip)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.config.image_size

    @property
    def conditional(self) -> bool:
        """Whether it draws from prompts: texts, or names of classes."""
        return self.config.conditional

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        batch_size: int = 64,
        progress: Callable[[float, int], None] | None = None,
        truncation: float = 1.0,
        **steps: Any,
    ) -> np.ndarray:
        """Draw one picture per prompt and seed.

        Args:
            prompts: one per picture, a text or the name of a class; None for an unconditional model.
            seeds: one per picture.
            negative_prompts: refused: there is no guidance that could steer away from them.
            batch_size: pictures drawn together; it changes speed and memory, not the pictures.
            progress: called with the pictures drawn so far and their total.
            truncation: latents are multiplied by it (styles are brought nearer to their mean): below 1 there is less
                variety, and less that is unusual.
            steps: settings of samplers, which one pass has none of: num_steps, guidance_scale, sampler.

        Returns:
            uint8 (pictures, height, width, 3).

        Raises:
            ValueError: prompts and seeds differ in number, prompts are given to an unconditional model or missing for
                a conditional one, or a setting is not possible.
        """
        if negative_prompts is not None:
            raise ValueError("a GAN has no guidance that could steer away from a negative prompt: leave it out")
        if self.conditional != (prompts is not None):
            raise ValueError("this model is unconditional: it takes seeds, and no prompts" if prompts else "no prompts")
        if prompts is not None and len(prompts) != len(seeds):
            raise ValueError(f"needs one prompt per seed: {len(prompts)} for {len(seeds)} seeds")
        if batch_size < 1 or truncation < 0:
            raise ValueError(f"batch_size is {batch_size}, must be 1 or more, and truncation {truncation}, 0 or more")
        pictures = [np.empty((0, self.image_size, self.image_size, 3), np.uint8)]
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            own = torch.tensor(list(seeds[part]), dtype=torch.int64, device=self._device)
            told = None if prompts is None else self._condition(prompts[part])
            pictures.append(to_pixels(self._images(own, told, truncation)))
            if progress is not None:
                progress(min(start + batch_size, len(seeds)), len(seeds))
        return np.concatenate(pictures)

    @torch.inference_mode()
    def interpolate(self, prompt: str | None, seeds: Sequence[int], steps: int) -> np.ndarray:
        """Pictures on the way from each seed's latent to the next one's, along the arc between them, with one prompt:
        uint8 (len(seeds) - 1, steps, height, width, 3).

        Raises ValueError where a conditional model is given none, or another one is, and for fewer than two seeds."""
        if self.conditional != (prompt is not None) or len(seeds) < 2:
            raise ValueError(f"needs {'a' if self.conditional else 'no'} prompt, and two seeds or more")
        own = derive_seeds(torch.tensor(list(seeds), dtype=torch.int64, device=self._device), "drawing")
        latents = random.normal(own, (self.config.latent_dim,), "latent")
        rows = []
        for one, other in itertools.pairwise(latents):
            angle = torch.acos((one @ other / (one.norm() * other.norm())).clamp(-1, 1))
            shares = torch.linspace(0, 1, steps, device=self._device)[:, None]
            path = (((1 - shares) * angle).sin() * one + (shares * angle).sin() * other) / angle.sin().clamp(min=1e-6)
            told = None if prompt is None else self._condition([prompt] * steps)
            with autocast(self.precision, self._device):
                rows.append(to_pixels(self.generator(path, told, own[:1].expand(steps)).float()))
        return np.stack(rows)

    def _images(self, seeds: Tensor, told: Any, truncation: float) -> Tensor:
        """As `Gan.draw` makes them in training."""
        own = derive_seeds(seeds, "drawing")
        latents = random.normal(own, (self.config.latent_dim,), "latent")
        with autocast(self.precision, self._device):
            generator: Any = self.generator
            if truncation != 1 and hasattr(generator, "styles"):
                styles = generator.styles(latents, told)
                mean = self._mean_styles(told, len(seeds))
                return generator.synthesise(mean + truncation * (styles - mean), own).float()
            return self.generator(truncation * latents if truncation != 1 else latents, told, own).float()

    def _mean_styles(self, told: Tensor | None, count: int) -> Tensor:
        """The mean style of each picture's condition, over 256 latents: (count, style_dim)."""
        generator: Any = self.generator
        latents = random.normal(torch.arange(256, device=self._device), (self.config.latent_dim,), "mean style")
        if told is None:
            return generator.styles(latents).mean(0).expand(count, -1)
        rows = [generator.styles(latents, each[None].expand(256, *each.shape)).mean(0) for each in told]
        return torch.stack(rows)

    def _condition(self, prompts: Sequence[str]) -> Any:
        if self.classes is not None:
            known = {name: label for label, name in enumerate(self.classes)}
            if unknown := [prompt for prompt in prompts if prompt not in known]:
                raise ValueError(f"{unknown[0]!r} is no class of this model; it has {', '.join(self.classes[:20])}")
            return torch.tensor([known[prompt] for prompt in prompts], device=self._device)
        assert self.tokenizer is not None
        if self.clip is not None:
            self.clip.check_length(list(prompts))
            read = self.clip.read_texts(encode(self.tokenizer, list(prompts)).to(self._device))[2]
            return read * math.sqrt(self.clip.embedding_dim)
        assert self.text_encoder is not None
        return pooled_text(self.text_encoder, encode(self.tokenizer, list(prompts)).to(self._device)).float()

    @property
    def _device(self) -> torch.device:
        return next(self.generator.parameters()).device
