"""Drawing with an exported image-to-image GAN: one pass from the given image to the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from genmodels.diffusion.pipeline import to_pixels
from genmodels.gan.config import Pix2PixConfig
from genmodels.gan.layout import GENERATOR, INDEX
from genmodels.gan.pix2pix import build_translator
from genmodels.precision import autocast, resolve_precision
from genmodels.random import derive_seeds
from genmodels.weights import copy_weights


class TranslationModel:
    """The generator of an export. A picture depends on the given image and its seed alone.

    Example:
        >>> model = TranslationModel.from_folder(Path("export"))  # doctest: +SKIP
        >>> model.draw(None, seeds=[1], images=np.zeros((1, 256, 256, 3), np.uint8)).shape  # doctest: +SKIP
        (1, 256, 256, 3)
    """

    conditional = takes_mask = takes_embedding = False
    takes_map = True  # the given image's colours are not mixed, as they were not in training
    classes = clip = None

    def __init__(self, config: Pix2PixConfig, generator: nn.Module, precision: str = "fp32") -> None:
        self.config, self.generator, self.precision = config, generator.eval(), precision

    @staticmethod
    def from_folder(folder: Path, device: str = "cpu", precision: str = "fp32") -> TranslationModel:
        """Open what `Pix2Pix.export` wrote. Raises ValueError where a part is missing or the precision unknown."""
        if not (folder / INDEX).is_file():
            raise ValueError(f"{folder} is no export of a GAN (no {INDEX} there)")
        config = Pix2PixConfig.model_validate(json.loads((folder / INDEX).read_text())["config"])
        generator = build_translator(config)
        copy_weights(load_file(folder / GENERATOR), generator, folder)
        return TranslationModel(config, generator.to(device), resolve_precision(precision, torch.device(device)))

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.config.image_size

    @property
    def given_size(self) -> int:
        """Height and width of the given image."""
        return self.config.image_size

    @property
    def image_condition(self) -> Any:
        """The given image: kind member."""
        return self.config.image_condition

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        images: np.ndarray | None = None,
        batch_size: int = 64,
        progress: Callable[[float, int], None] | None = None,
        **steps: Any,
    ) -> np.ndarray:
        """Draw one picture for each given image and seed.

        Args:
            prompts, negative_prompts: refused: no text is read.
            seeds: one per image.
            images: uint8 (pictures, height, width, 3), of `given_size`.
            batch_size: pictures drawn together; it changes speed and memory, not the pictures.
            progress: called with the pictures drawn so far and their total.
            steps: settings of samplers, which one pass has none of: num_steps, guidance_scale, sampler.

        Returns:
            uint8 (pictures, height, width, 3).

        Raises:
            ValueError: there are prompts, no images, or images of another number or size.
        """
        if prompts or negative_prompts:
            raise ValueError("this model is told an image, and no prompts")
        size = self.given_size
        if images is None or images.shape != (len(seeds), size, size, 3):
            got = "none" if images is None else str(images.shape)
            raise ValueError(f"needs {len(seeds)} images of {size} by {size} pixels, got {got}")
        device = next(self.generator.parameters()).device
        pictures = [np.empty((0, size, size, 3), np.uint8)]
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            given = torch.from_numpy(np.ascontiguousarray(images[part])).to(device).permute(0, 3, 1, 2).float()
            own = derive_seeds(torch.tensor(list(seeds[part]), dtype=torch.int64, device=device), "drawing")
            with autocast(self.precision, device):
                pictures.append(to_pixels(self.generator(given / 127.5 - 1, own).float()))
            if progress is not None:
                progress(min(start + batch_size, len(seeds)), len(seeds))
        return np.concatenate(pictures)
