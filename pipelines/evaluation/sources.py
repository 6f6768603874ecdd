"""Where pictures come from that are measured: a model that draws them, files, or shards of real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from infra.errors import BadRequest
from pipelines.data.decode import IMAGE_SUFFIXES
from pipelines.data.fixed import spread_slots
from pipelines.data.index import DatasetIndex
from pipelines.data.read import build_batch, read_chunks
from pipelines.data.seeds import sample_seeds, uniform
from pipelines.data.spec import BadCaption, SampleSpec

_LANE = -1  # no lane of a training order
_BLOCK_PIXELS = 1 << 22  # of pictures that are read or rebuilt at once
_ROUNDING_DECIBELS = 58.9  # 10 log₁₀(2² / ((2/255)²/12)): no reconstruction in 8 bits is known to be better


class Block(NamedTuple):
    """Neighbouring pictures of a source: uint8 (n, height, width, 3), a caption and a key for each, and what else is
    known of each by one of the names `store.SCORES`, float32 (n,). `unused` says why each of those was left out that
    cannot be used. `others` are the samples' other images, where the spec names a member."""

    pictures: np.ndarray
    captions: list[str]
    keys: list[str]
    scores: Mapping[str, np.ndarray] = MappingProxyType({})
    unused: Sequence[str] = ()
    others: np.ndarray | None = None


Draw = Callable[[int, int], Block]


class Source(Protocol):
    """Pictures by number. It is sent to every process that measures, and opened there."""

    @property
    def count(self) -> int: ...

    @property
    def block(self) -> int:
        """How many are measured at once."""

    def open(self, device: Any) -> Draw:
        """A function of the first number and the one behind the last; what cannot be read is left out."""


@dataclass(frozen=True)
class Drawn:
    """Pictures that a model draws.

    Args:
        model: what `infra.registry.resolve_model` opens on any node.
        tracking_uri: where it is registered.
        prompts: one for each picture; None for an unconditional model.
        seeds: one for each.
        options: of `TextToImage.draw`.
        precision: fp32, bf16 or auto.
        originals: for a model that is told an image: real pictures, one for each seed, of which it is told a
            low-resolution version, say, and that it should draw again. Their captions are the prompts.
    """

    model: str
    tracking_uri: str | None
    prompts: Sequence[str] | None
    seeds: Sequence[int]
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    originals: Shards | None = None

    @property
    def count(self) -> int:
        return len(self.seeds)

    def first(self, count: int) -> Drawn:
        """The first pictures alone."""
        return replace(
            self,
            prompts=None if self.prompts is None else self.prompts[:count],
            seeds=self.seeds[:count],
            originals=None if self.originals is None else self.originals.first(count),
        )

    @property
    def block(self) -> int:
        return 2 * max(32, -(-int(self.options.get("batch_size", 64)) // 2))  # even: whole pairs

    def open(self, device: Any) -> Draw:
        model = _opened_model(self.model, self.tracking_uri, self.precision, device)
        if self.originals is not None:
            return self._open_told(model, self.originals.open(device))

        def draw(start: int, stop: int) -> Block:
            prompts = None if self.prompts is None else list(self.prompts[start:stop])
            seeds = list(self.seeds[start:stop])
            pictures = model.draw(prompts, seeds, **self.options)
            return Block(pictures, prompts or [""] * len(seeds), [f"seed {seed}" for seed in seeds])

        draw.precision = model.precision  # type: ignore[attr-defined]  # which auto meant on this device
        return draw

    def _open_told(self, model: Any, read: Draw) -> Draw:
        """For a model that is told an image: of each original, what it is to be got back from."""
        import torch

        from genmodels.diffusion.image_condition import as_given
        from genmodels.diffusion.pipeline import to_pixels
        from genmodels.metrics.image import psnr, ssim

        def draw(start: int, stop: int) -> Block:
            block = read(start, stop)
            seeds = list(self.seeds[start : start + len(block.captions)])
            if not seeds:
                return block
            images = torch.from_numpy(block.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
            batch = {"images": images, "seeds": torch.tensor(seeds)}
            if block.others is not None:
                batch["condition_images"] = torch.from_numpy(block.others).permute(0, 3, 1, 2).float() / 127.5 - 1
            given, masks = as_given(model.image_condition, batch)
            told: dict[str, Any] = {"images": to_pixels(given)}
            if masks is not None:
                told["masks"] = masks[:, 0].numpy() > 0
            pictures = model.draw(block.captions if model.conditional else None, seeds, **told, **self.options)
            drawn = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
            scores = {"psnr": psnr(drawn, images).clamp(max=_ROUNDING_DECIBELS), "ssim": ssim(drawn, images)}
            return block._replace(pictures=pictures, scores={name: found.numpy() for name, found in scores.items()})

        draw.precision = model.precision  # type: ignore[attr-defined]
        return draw


_models: dict[tuple[str, str], Any] = {}  # the one of this process: several sources, one after the other, draw with it


def _opened_model(reference: str, tracking_uri: str | None, precision: str, device: Any) -> Any:
    from genmodels.drawing import open_drawing_model
    from infra.registry import resolve_model

    if (reference, precision) not in _models:
        _models.clear()
        folder = resolve_model(reference, tracking_uri)
        _models[reference, precision] = open_drawing_model(folder, device, precision)
    return _models[reference, precision]


@dataclass(frozen=True)
class Files:
    """Image files, each with its caption in a `.txt` beside it, where there is one; cut to squares."""

    paths: Sequence[str]
    image_size: int
    block: int = 64

    @staticmethod
    def under(folder: Path, image_size: int) -> Files:
        """All image files of a folder and those in it. Raises BadRequest where there is none."""
        names = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
        if not names:
            raise BadRequest(f"{folder}: holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
        return Files(names, image_size)

    @property
    def count(self) -> int:
        return len(self.paths)

    @property
    def captions(self) -> list[str]:
        """Of all, "" where there is none."""
        return [_text_beside(Path(path)) for path in self.paths]

    def open(self, device: Any) -> Draw:
        from pipelines.data.decode import BadImage, decode_image

        def read(start: int, stop: int) -> Block:
            found = Block(np.empty((0, self.image_size, self.image_size, 3), np.uint8), [], [])
            pictures = []
            for name in self.paths[start:stop]:
                out = np.empty((3, self.image_size, self.image_size), np.uint8)
                try:
                    decode_image(Path(name).read_bytes(), self.image_size, out)
                except (OSError, BadImage) as error:
                    raise BadRequest(f"{name}: cannot be read as an image ({error})") from error
                pictures.append(out.transpose(1, 2, 0))
                found.captions.append(_text_beside(Path(name)))
                found.keys.append(Path(name).name)
            return found._replace(pictures=np.stack(pictures))

        return read


def _text_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""


@dataclass(frozen=True)
class Shards:
    """Real pictures of a dataset: samples spread evenly over it, always the same ones."""

    index: DatasetIndex
    spec: SampleSpec
    slots: NDArray[np.int64]

    @staticmethod
    def spread(index: DatasetIndex, spec: SampleSpec, count: int) -> Shards:
        """`count` samples, or all where there are fewer."""
        return Shards(index, spec, spread_slots(index, min(count, index.samples)))

    def first(self, count: int) -> Shards:
        """The first samples alone."""
        return replace(self, slots=self.slots[:count])

    @property
    def count(self) -> int:
        return len(self.slots)

    @property
    def block(self) -> int:
        return max(16, min(256, _BLOCK_PIXELS // self.spec.image_size**2))

    def open(self, device: Any) -> Draw:
        def read(start: int, stop: int) -> Block:
            slots = self.slots[start:stop]
            table = build_batch(self.index, self.spec, self._chunks(slots), slots, self._seeds(start, stop), 0)
            reasons = table["reason"].to_pylist()
            good = [not reason for reason in reasons]
            size = self.spec.image_size
            pixels = np.stack([np.frombuffer(row, np.uint8) for row in table["image"].to_pylist()])
            pictures = pixels.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)[good]
            captions, keys = (
                [text for text, ok in zip(table[name].to_pylist(), good) if ok] for name in ("caption", "key")
            )
            unused = [f"{key}: {reason}" for key, reason in zip(table["key"].to_pylist(), reasons) if reason]
            others = None
            if self.spec.condition_image is not None:
                told = np.stack([np.frombuffer(row, np.uint8) for row in table["condition_image"].to_pylist()])
                others = np.ascontiguousarray(told.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)[good])
            return Block(np.ascontiguousarray(pictures), captions, keys, unused=unused, others=others)

        return read

    def captions(self) -> list[str]:
        """Of those samples that can be used, in order. Raises BadRequest where there is none."""
        found = []
        for start in range(0, self.count, self.block):
            slots = self.slots[start : start + self.block]
            chunks = self._chunks(slots)
            draws = uniform(self._seeds(start, start + len(slots)), "caption")
            for (shard, chunk, within), draw in zip(slots.tolist(), draws):
                source = chunks[shard, chunk]
                if source.reason or source.samples[within].flaw:
                    continue
                try:
                    found.append(self.spec.choose_caption(source.members(within), draw))
                except BadCaption:
                    continue
        if not found:
            raise BadRequest(
                f"{self.index.url}: no sample has a caption at {self.spec.caption}: name it with --caption"
            )
        return found

    def _chunks(self, slots: NDArray[np.int64]) -> Any:
        return read_chunks(self.index, {(int(shard), int(chunk)) for shard, chunk, _ in slots})

    def _seeds(self, start: int, stop: int) -> NDArray[np.int64]:
        return sample_seeds(0, _LANE, np.arange(start, stop))


@dataclass(frozen=True)
class Reconstructed:
    """Real pictures as an autoencoder gives them back, with their distances from the originals.

    Args:
        model, tracking_uri: as of `Drawn`.
        shards: the originals.
        perceptual: file with VGG-16 and LPIPS weights; None: no learned distance.
    """

    model: str
    tracking_uri: str | None
    shards: Shards
    perceptual: str | None = None

    @property
    def count(self) -> int:
        return self.shards.count

    @property
    def block(self) -> int:
        return min(64, self.shards.block)

    def open(self, device: Any) -> Draw:
        import torch

        from genmodels.autoencoder.codec import LatentCodec
        from genmodels.autoencoder.perceptual import PerceptualDistance
        from genmodels.metrics.image import psnr, ssim
        from infra.registry import resolve_model

        codec = LatentCodec.from_folder(resolve_model(self.model, self.tracking_uri)).to(device)
        distance = None if self.perceptual is None else PerceptualDistance.from_file(Path(self.perceptual)).to(device)
        read = self.shards.open(device)

        @torch.inference_mode()
        def rebuild(start: int, stop: int) -> Block:
            originals = read(start, stop)
            if not len(originals.pictures):
                return originals
            images = torch.from_numpy(originals.pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
            rebuilt = ((codec.decode(codec.encode(images)).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
            scores = {"psnr": psnr(rebuilt, images).clamp(max=_ROUNDING_DECIBELS), "ssim": ssim(rebuilt, images)}
            if distance is not None:
                scores["lpips"] = distance(rebuilt, images)
            pixels = ((rebuilt + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
            return originals._replace(
                pictures=np.ascontiguousarray(pixels.cpu().numpy()),
                scores={name: values.float().cpu().numpy() for name, values in scores.items()},
            )

        return rebuild
