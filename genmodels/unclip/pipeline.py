"""From a sentence to a picture through all stages of unCLIP: prior, decoder, upsamplers.

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from genmodels.clip.frozen import FrozenClip
from genmodels.diffusion.config import LowResolutionCondition
from genmodels.diffusion.degradation import level_of
from genmodels.diffusion.image_condition import from_given
from genmodels.diffusion.pipeline import TextToImage, to_pixels
from genmodels.diffusion.sampler import Condition, Guidance, SamplerName, make_sampler, stopped_at
from genmodels.random import derive_seeds
from genmodels.unclip import autoregressive_prior, diffusion_prior
from genmodels.unclip.layout import check_truncation, read_index
from genmodels.unclip.prior import read_captions

TEXT_EMBEDDING, TEXT_ONLY = "text_embedding", "text_only"
"""In place of a prior's image embedding the decoder is told the sentence's own embedding, or the sentence alone: the
ablations of the paper's section 5.1."""


class Unclip:
    """All stages of unCLIP, or of a cascade that reads captions alone, as Imagen's.

    A picture depends on its prompt and seed, not on the batch it was drawn in.

    Example:
        >>> model = Unclip.from_folder(Path("export"))  # doctest: +SKIP
        >>> model.draw(["a red seven on a white background"], seeds=[1]).shape  # doctest: +SKIP
        (1, 64, 64, 3)
    """

    conditional, takes_mask, takes_map, takes_embedding = True, False, False, False
    given_size, image_condition, classes = 0, None, None

    def __init__(
        self,
        clip: FrozenClip | None,
        priors: Mapping[str, Any],
        decoder: TextToImage,
        upsamplers: Sequence[TextToImage],
        settings: dict[str, Any],
    ) -> None:
        """Args: `priors` (see `open_prior`) by name, the first is used where none is named; a cascade has none, and no
        `clip`; `settings`: the index's `drawing`."""
        self._clip = clip
        self.priors, self.decoder, self.upsamplers = dict(priors), decoder, list(upsamplers)
        self.settings = settings

    @staticmethod
    def from_folder(folder: Path, device: str = "cpu", precision: str = "fp32") -> Unclip:
        """Open what `join` wrote. Raises ValueError where a part is missing."""
        index = read_index(folder)
        clip = None if index["clip"] is None else FrozenClip.from_folder(folder / "clip").to(device)
        priors = {name: open_prior(folder / name, kind, device) for name, kind in index["priors"].items()}
        decoder = TextToImage.from_folder(folder / "decoder", device, precision, clip)
        upsamplers = [TextToImage.from_folder(folder / name, device, precision) for name in index["upsamplers"]]
        return Unclip(clip, priors, decoder, upsamplers, index["drawing"])

    @property
    def clip(self) -> FrozenClip:
        """Whose embeddings stand between prior and decoder. Raises ValueError where captions alone are read."""
        if self._clip is None:
            raise ValueError("this model reads captions alone: it has no CLIP, and so no embeddings of pictures")
        return self._clip

    @property
    def image_size(self) -> int:
        """Height and width of a picture in pixels."""
        return (self.upsamplers[-1] if self.upsamplers else self.decoder).image_size

    @property
    def precision(self) -> str:
        """Of the denoisers: "fp32" or "bf16"."""
        return self.decoder.precision

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        batch_size: int = 64,
        progress: Callable[[float, int], None] | None = None,
        by: str | None = None,
        tell_captions: bool = True,
        **options: Any,
    ) -> np.ndarray:
        """Draw one picture per prompt and seed.

        Args:
            prompts: one per picture.
            seeds: one per picture.
            negative_prompts: one per picture, what decoder (if it reads text) and prior are steered away from.
            num_steps, guidance_scale, sampler: of the decoder; None takes those of `settings`, where those of the other
                stages are.
            batch_size: pictures drawn together; it changes speed and memory, not the pictures.
            progress: called with the pictures drawn so far (fractions count) and their total.
            by: how a sentence becomes what the decoder is told: the name of a prior, TEXT_EMBEDDING or TEXT_ONLY.
            tell_captions: whether a decoder that reads text is told the prompts too, beside the embeddings.
            options: eta, guidance_rescale and guidance_interval of the decoder.

        Returns:
            uint8 (pictures, height, width, 3).

        Raises:
            ValueError: prompts and seeds differ in number, a prompt is longer than the CLIP reads, or a setting is not
                possible.
        """
        texts = list(prompts or ())
        if len(texts) != len(seeds):
            raise ValueError(f"needs one prompt per seed: {len(texts)} for {len(seeds)} seeds")
        if self._clip is None:
            by = by or TEXT_ONLY
        else:
            self._clip.check_length([*texts, *(negative_prompts or ())])
        if by == TEXT_ONLY and not self.decoder.conditional:
            raise ValueError("this decoder reads no text: it can be told embeddings alone")
        asked, steered = texts, negative_prompts

        def told(part: slice) -> Tensor | None:
            if by == TEXT_ONLY:
                return None
            if by == TEXT_EMBEDDING:
                return self.clip.read_texts(self._tokens(asked[part]))[2]
            return self.embed(asked[part], seeds[part], None if steered is None else steered[part], by)

        if not tell_captions:
            texts, negative_prompts = [""] * len(texts), None
        given = {"num_steps": num_steps, "guidance_scale": guidance_scale, "sampler": sampler}
        drawing = {**{name: value for name, value in given.items() if value is not None}, **options}
        return self._decode(told, texts, seeds, negative_prompts, batch_size, progress, drawing)

    @torch.inference_mode()
    def embed(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        by: str | None = None,
    ) -> Tensor:
        """A prior's image embeddings of sentences: unit vectors, float32 (len(prompts), embedding_dim)."""
        name = by or next(iter(self.priors))
        if name not in self.priors:
            known = ", ".join((*self.priors, TEXT_EMBEDDING, TEXT_ONLY))
            raise ValueError(f"there is no {name!r} in this model to draw by, only {known}")
        own = self.decoder.seeds(seeds)
        told = read_captions(self.clip, self._tokens(list(prompts)))
        nothing = read_captions(self.clip, self._tokens(list(negative_prompts or [""] * len(prompts))))
        settings = self.settings["priors"].get(name, {})
        return draw_embeddings(self.priors[name], told, nothing, derive_seeds(own, "prior"), settings)

    @torch.inference_mode()
    def decode(
        self,
        embeddings: Tensor | None,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None = None,
        batch_size: int = 64,
        progress: Callable[[float, int], None] | None = None,
        drawing: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Pictures of image embeddings, (n, embedding_dim), through decoder and upsamplers; `drawing` is the decoder's
        settings. The prompts are told to a decoder that reads text. uint8 (n, height, width, 3)."""

        def told(part: slice) -> Tensor | None:
            return None if embeddings is None else embeddings[part]

        return self._decode(told, prompts, seeds, negative_prompts, batch_size, progress, drawing)

    def _decode(
        self,
        told: Callable[[slice], Tensor | None],
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None,
        batch_size: int,
        progress: Callable[[float, int], None] | None,
        drawing: dict[str, Any] | None,
    ) -> np.ndarray:
        """See `decode`; `told` gives the embeddings of a part of the pictures."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be 1 or more")
        if negative_prompts is not None and len(negative_prompts) != len(seeds):
            raise ValueError(f"needs one negative prompt per seed: {len(negative_prompts)} for {len(seeds)} seeds")
        pictures = [np.empty((0, self.image_size, self.image_size, 3), np.uint8)]
        stages = 1 + len(self.upsamplers)
        for start in range(0, len(seeds), batch_size):
            part = slice(start, min(start + batch_size, len(seeds)))

            def tell(stage: int, done: float, part: slice = part) -> None:
                if progress is not None:
                    share = (stage + done) / stages
                    progress(part.start + (part.stop - part.start) * share, len(seeds))

            images, level = self._draw_base(
                told(part),
                prompts[part],
                seeds[part],
                None if negative_prompts is None else negative_prompts[part],
                {**self.settings["decoder"], **(drawing or {})},
                tell,
            )
            for number, upsampler in enumerate(self.upsamplers):
                images = self._upsample(upsampler, number, images, seeds[part], level, tell)
                level = None
            pictures.append(to_pixels(images))
            tell(stages - 1, 1.0)
        return np.concatenate(pictures)

    @torch.inference_mode()
    def upsample(self, images: Tensor, seeds: Sequence[int], batch_size: int = 64) -> Tensor:
        """Images of the decoder's size, (n, 3, height, width) in [-1, 1], through all upsamplers."""
        parts = []
        for start in range(0, len(seeds), batch_size):
            part = images[start : start + batch_size]
            for number, upsampler in enumerate(self.upsamplers):
                own = seeds[start : start + batch_size]
                part = self._upsample(upsampler, number, part, own, None, lambda stage, done: None)
            parts.append(part)
        return torch.cat(parts)

    def variations(self, pictures: np.ndarray, seeds: Sequence[int], **options: Any) -> np.ndarray:
        """Other pictures with the embeddings of given ones: uint8 (n, height, width, 3), one for each seed.

        Args:
            pictures: uint8 (n, height, width, 3), square.
            seeds: one per picture.
            options: of `decode`.

        Raises:
            ValueError: another number or shape.
        """
        return self.decode(self.embed_pictures(pictures, len(seeds)), [""] * len(seeds), seeds, **options)

    def interpolate(self, one: np.ndarray, other: np.ndarray, count: int, seed: int, **options: Any) -> np.ndarray:
        """`count` pictures from `one` to `other`, uint8 (height, width, 3) each, along the arc between their
        embeddings, all from the same noise: uint8 (count, height, width, 3)."""
        first, last = (self.embed_pictures(picture[None], 1)[0] for picture in (one, other))
        shares = torch.linspace(0, 1, count, device=first.device)
        path = slerp(first.expand(count, -1), last.expand(count, -1), shares)
        return self.decode(path, [""] * count, [seed] * count, **options)

    def text_difference(
        self, picture: np.ndarray, before: str, after: str, count: int, seed: int, largest: float = 0.5, **options: Any
    ) -> np.ndarray:
        """`count` pictures from `picture` along the direction in which `after` differs from `before`.

        Ramesh et al. 2022, section 3.3: the embedding is rotated by up to `largest` (a share from 0 to 1) towards the
        normalised difference of the two sentences' embeddings.
        """
        self.clip.check_length([before, after])
        one = self.embed_pictures(picture[None], 1)
        texts = self.clip.read_texts(self._tokens([before, after]))[2]
        direction = normalize(texts[1:] - texts[:1], dim=1)
        shares = torch.linspace(0, largest, count, device=one.device)
        path = slerp(one.expand(count, -1), direction.expand(count, -1), shares)
        return self.decode(path, [""] * count, [seed] * count, **options)

    @torch.inference_mode()
    def embed_pictures(self, pictures: np.ndarray, count: int) -> Tensor:
        """Unit vectors of pictures, uint8 (count, height, width, 3): float32 (count, embedding_dim)."""
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or len(pictures) != count:
            raise ValueError(f"needs {count} pictures, uint8 (height, width, 3), got {pictures.dtype} {pictures.shape}")
        if pictures.shape[1] != pictures.shape[2] or pictures.shape[1] < self.clip.image_size:
            raise ValueError(
                f"pictures must be square and at least {self.clip.image_size} pixels a side, not "
                f"{pictures.shape[2]} by {pictures.shape[1]}"
            )
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.clip.embed_images(images.to(self.decoder.seeds([0]).device))

    def _draw_base(
        self,
        embeddings: Tensor | None,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negative_prompts: Sequence[str] | None,
        drawing: dict[str, Any],
        tell: Callable[[int, float], None],
    ) -> tuple[Tensor, float | None]:
        """The decoder's images, and how noisy they are still where the first upsampler is to finish them."""
        decoder, steps = self.decoder, drawing["num_steps"]
        texts = prompts if decoder.conditional else None
        negative = negative_prompts if decoder.conditional else None
        condition, nothing = decoder.conditions(texts, negative, len(seeds), embeddings)
        guidance = Guidance(
            drawing["guidance_scale"],
            drawing.get("guidance_rescale", 0.0),
            tuple(drawing.get("guidance_interval", (0.0, 1.0))),  # type: ignore[arg-type]
        )
        sampler = make_sampler(drawing["sampler"], decoder.sampler_settings, drawing.get("eta", 0.0))
        stop = self._truncation(drawing["sampler"])
        images = decoder.sample(
            seeds, sampler, steps, condition, nothing, guidance, lambda done: tell(0, done / steps), stop
        )
        if decoder.autoencoder is not None:
            images = decoder.autoencoder.decode(images)
        timestep = int(stopped_at(sampler, stop))
        if not timestep:
            return images.clamp(-1, 1), None
        return images, level_of(float(1 - sampler.alphas_cumprod[timestep]) ** 0.5)

    def _truncation(self, sampler: str) -> float:
        """Where the decoder ends: 0, or with truncated augmentation where the first upsampler takes over."""
        if not self.upsamplers or self.settings["upsamplers"][0].get("augmentation") != "truncated":
            return 0.0
        latents = self.decoder.autoencoder is not None
        check_truncation(not latents and "beta_schedule" in self.decoder.sampler_settings, sampler)
        if not self.upsamplers[0].denoiser.takes_level:
            raise ValueError("truncated augmentation needs an upsampler that was trained with augmentation")
        # The level is that of the upsampler's training; the decoder's own schedule may come to it elsewhere.
        level = self.settings["upsamplers"][0]["augmentation_level"]
        noisy = make_sampler(sampler, self.decoder.sampler_settings).alphas_cumprod  # type: ignore[arg-type]
        clean = sum(level_of(float(1 - alpha) ** 0.5) <= level for alpha in noisy)
        return clean / len(noisy)

    def _upsample(
        self,
        model: TextToImage,
        number: int,
        images: Tensor,
        seeds: Sequence[int],
        level: float | None,
        tell: Callable[[int, float], None],
    ) -> Tensor:
        """Larger images, in [-1, 1]; `level` says how noisy the given ones are, None: clean."""
        told, settings = model.image_condition, self.settings["upsamplers"][number]
        assert isinstance(told, LowResolutionCondition)
        own = derive_seeds(model.seeds(seeds), f"upsampler {number}")
        condition, nothing = model.conditions(None, None, len(seeds))
        added = settings["augmentation_level"] if level is None and model.denoiser.takes_level else 0.0
        condition["image"] = from_given(told, images, level=added, seeds=own)
        if model.denoiser.takes_level:
            known = torch.full((len(seeds),), added if level is None else level)
            condition["level"] = known.to(images.device)
        steps = settings["num_steps"]
        sampler = make_sampler(settings["sampler"], model.sampler_settings)
        drawn = model.sample(
            own.tolist(), sampler, steps, condition, nothing, Guidance(), lambda done: tell(1 + number, done / steps)
        )
        return drawn.clamp(-1, 1)

    def _tokens(self, texts: list[str]) -> Tensor:
        return self.clip.tokens(texts).to(self.decoder.seeds([0]).device)


def open_prior(folder: Path, kind: str, device: str = "cpu") -> Any:
    """A prior of either kind, in evaluation mode. Raises ValueError where the folder holds none."""
    source: Any = autoregressive_prior if kind == "autoregressive_prior" else diffusion_prior
    return source.open_prior(folder).to(device)


def draw_embeddings(
    prior: Any, told: Condition, nothing: Condition, seeds: Tensor, settings: Mapping[str, Any]
) -> Tensor:
    """Image embeddings by a prior of either kind; `settings` are of its own `draw_embeddings`."""
    if isinstance(prior, autoregressive_prior.AutoregressivePriorNetwork):
        return autoregressive_prior.draw_embeddings(prior, told, nothing, seeds, **settings)
    return diffusion_prior.draw_embeddings(prior, told, nothing, seeds, **settings)


def slerp(one: Tensor, other: Tensor, shares: Tensor) -> Tensor:
    """Points on the arcs from unit vectors `one` to `other`, (n, dim) each, at `shares` (n,) of the way."""
    angle = (one * other).sum(1).clamp(-1, 1).acos().unsqueeze(1)
    shares = shares.unsqueeze(1)
    small = angle < 1e-4
    whole = torch.where(small, torch.ones_like(angle), angle.sin())
    bent = (((1 - shares) * angle).sin() * one + (shares * angle).sin() * other) / whole
    return normalize(torch.where(small, (1 - shares) * one + shares * other, bent), dim=1)
