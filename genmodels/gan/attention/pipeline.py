"""Drawing with an exported AttnGAN: one pass from a latent and a caption, and what each word is looked at for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genmodels.gan.attention.config import AttnGanConfig
from genmodels.gan.attention.frozen import FrozenDamsm
from genmodels.gan.attention.matching import Texts
from genmodels.gan.attention.networks import Generator, Pictures
from genmodels.gan.attention.objective import noises
from genmodels.gan.export import read_index, read_networks
from genmodels.gan.pipeline import GanModel
from genmodels.precision import autocast, resolve_precision
from genmodels.random import derive_seeds
from genmodels.text.tokenizer import SUFFIX


class AttnGanModel(GanModel):
    """The generator of an export, with the DAMSM that reads its prompts; a picture depends on prompt and seed alone.

    Example:
        >>> model = AttnGanModel.from_folder(Path("export"))  # doctest: +SKIP
        >>> model.draw(["a red seven on a white background"], seeds=[1]).shape  # doctest: +SKIP
        (1, 32, 32, 3)
        >>> words, maps = model.attention("a red seven on a white background", seed=1)  # doctest: +SKIP
    """

    config: AttnGanConfig  # type: ignore[assignment]

    def __init__(
        self, config: AttnGanConfig, generator: Generator, damsm: FrozenDamsm, precision: str = "fp32"
    ) -> None:
        self.config, self.generator, self.damsm, self.precision = config, generator.eval(), damsm, precision
        self.text_encoder = self.clip = self.classes = None
        self.tokenizer = damsm.tokenizer

    @staticmethod
    def from_folder(folder: Path, device: str = "cpu", precision: str = "fp32") -> AttnGanModel:
        """Open what `AttnGan.export` wrote. Raises ValueError where a part is missing or the precision unknown."""
        config = AttnGanConfig.model_validate(read_index(folder)["config"])
        damsm = FrozenDamsm.from_folder(folder / "damsm").to(device)
        generator = Generator(config, damsm.embedding_dim)
        read_networks(folder, {"generator": generator})
        return AttnGanModel(config, generator.to(device), damsm, resolve_precision(precision, torch.device(device)))

    @torch.inference_mode()
    def attention(self, prompt: str, seed: int) -> tuple[list[str], np.ndarray]:
        """The words of a prompt, its end last, and how much the last stage looked at each of them at each place of the
        picture before it: float32 (words, rows, columns), which add up to 1 at each place."""
        token_ids, texts = self._read([prompt])
        pictures = self._pictures(torch.tensor([seed], device=self._device), texts, 1.0)
        kept = texts.mask[0]
        words = self.damsm.tokenizer.convert_ids_to_tokens(token_ids[0][kept].tolist())
        return [word.removesuffix(SUFFIX) for word in words], pictures.attention[0][kept].float().cpu().numpy()

    def interpolate(self, prompt: str | None, seeds: Sequence[int], steps: int) -> np.ndarray:
        """Refused: between two latents there are also two conditions. Raises ValueError."""
        raise ValueError("an AttnGAN has no way from one latent to another: it draws its condition too")

    def _images(self, seeds: Tensor, told: Any, truncation: float) -> Tensor:
        return self._pictures(seeds, told, truncation).images[-1].float()

    def _pictures(self, seeds: Tensor, texts: Texts, truncation: float) -> Pictures:
        """As `AttnGan.draw` makes them in training; truncated are latent and condition."""
        drawn_from = (truncation * noise for noise in noises(self.config, derive_seeds(seeds, "drawing")))
        with autocast(self.precision, self._device):
            return self.generator(*drawn_from, *texts)

    def _condition(self, prompts: Sequence[str]) -> Any:
        return self._read(prompts)[1]

    def _read(self, prompts: Sequence[str]) -> tuple[Tensor, Texts]:
        self.damsm.check_length(list(prompts))
        token_ids = self.damsm.tokens(list(prompts)).to(self._device)
        return token_ids, self.damsm.read_texts(token_ids)
