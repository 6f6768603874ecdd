"""Drawing with an exported image-to-image GAN: one pass from the given image to the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from genmodels.diffusion.config import MemberCondition
from genmodels.diffusion.pipeline import to_pixels
from genmodels.gan.cycle import build_generators
from genmodels.gan.export import read_index, read_networks
from genmodels.gan.pix2pix import build_translator
from genmodels.gan.translation_config import CycleGanConfig, Pix2PixConfig
from genmodels.precision import autocast, resolve_precision
from genmodels.random import derive_seeds

DIRECTIONS = ("ab", "ba")  # from set A to B, and back
_Config = Annotated[Pix2PixConfig | CycleGanConfig, Field(discriminator="kind")]


class TranslationModel:
    """The generator, or both, of an export. A picture depends on the given image and its seed alone.

    Example:
        >>> model = TranslationModel.from_folder(Path("export"))  # doctest: +SKIP
        >>> model.draw(None, seeds=[1], images=np.zeros((1, 256, 256, 3), np.uint8)).shape  # doctest: +SKIP
        (1, 256, 256, 3)
    """

    conditional = takes_mask = takes_embedding = False
    classes = clip = None

    def __init__(self, config: Pix2PixConfig | CycleGanConfig, generator: nn.Module, precision: str = "fp32") -> None:
        self.config, self.generator, self.precision = config, generator.eval(), precision

    @staticmethod
    def from_folder(folder: Path, device: str = "cpu", precision: str = "fp32") -> TranslationModel:
        """Open what `Pix2Pix.export` or `CycleGan.export` wrote.

        Raises:
            ValueError: a part is missing or the precision unknown.
        """
        config: Pix2PixConfig | CycleGanConfig = TypeAdapter(_Config).validate_python(read_index(folder)["config"])
        generator = build_translator(config) if isinstance(config, Pix2PixConfig) else build_generators(config)
        read_networks(folder, {"generator": generator})
        return TranslationModel(config, generator.to(device), resolve_precision(precision, torch.device(device)))

    @property
    def takes_map(self) -> bool:
        """Whether the given image is resized without mixing its colours, as in training: of pairs."""
        return isinstance(self.config, Pix2PixConfig)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.config.image_size

    @property
    def varies(self) -> bool:
        """Whether pictures of one image differ by their seeds."""
        return isinstance(self.config, Pix2PixConfig) and self.config.dropout > 0

    @property
    def given_size(self) -> int:
        """Height and width of the given image."""
        return self.config.image_size

    @property
    def image_condition(self) -> Any:
        """The given image: kind member."""
        return self.config.image_condition if isinstance(self.config, Pix2PixConfig) else MemberCondition()

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        images: np.ndarray | None = None,
        batch_size: int = 64,
        progress: Callable[[float, int], None] | None = None,
        direction: str = "ab",
        **steps: Any,
    ) -> np.ndarray:
        """Draw one picture for each given image and seed.

        Args:
            prompts, negative_prompts: refused: no text is read.
            seeds: one per image.
            images: uint8 (pictures, height, width, 3), of `given_size`.
            batch_size: pictures drawn together; it changes speed and memory, not the pictures.
            progress: called with the pictures drawn so far and their total.
            direction: of a CycleGAN: from its set A (data.url) to B (data.other_url), or "ba", back.
            steps: settings of samplers, which one pass has none of: num_steps, guidance_scale, sampler.

        Returns:
            uint8 (pictures, height, width, 3).

        Raises:
            ValueError: there are prompts, no images, images of another number or size, or no such direction.
        """
        if direction not in (DIRECTIONS if isinstance(self.config, CycleGanConfig) else DIRECTIONS[:1]):
            known = "only ab and ba" if isinstance(self.config, CycleGanConfig) else "one: it learnt from pairs"
            raise ValueError(f"there is no direction {direction!r} of this model, {known}")
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
                pictures.append(to_pixels(self._made(given / 127.5 - 1, own, direction).float()))
            if progress is not None:
                progress(min(start + batch_size, len(seeds)), len(seeds))
        return np.concatenate(pictures)

    def _made(self, given: Tensor, seeds: Tensor, direction: str) -> Tensor:
        return (
            self.generator(direction, given)
            if isinstance(self.config, CycleGanConfig)
            else self.generator(given, seeds)
        )
