"""What a batch is made of: how images are cut, which caption is taken, and how it is tokenised."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from infra.errors import BadRequest
from pipelines.data.decode import IMAGE_SUFFIXES

_SURROGATE = re.compile("[\ud800-\udfff]")


class BadCaption(Exception):
    """The caption cannot be used; the message is the reason that is recorded."""


class BadArray(Exception):
    """An array of a sample cannot be used; the message is the reason that is recorded."""


@dataclass(frozen=True)
class ArraySpec:
    """An array of numbers that is stored with each sample as a .npy member, as `encode_latents.py` writes them.

    Args:
        name: of the key in the batch.
        member: suffix in the shards, "clip.npy".
        shape: of one sample's array.
    """

    name: str
    member: str
    shape: tuple[int, ...]

    def read(self, members: Mapping[str, bytes]) -> NDArray[np.float32]:
        """The sample's array as float32. Raises BadArray where it is missing or another one."""
        if self.member not in members:
            raise BadArray(f"{self.member}: missing")
        try:
            found = np.load(io.BytesIO(members[self.member]), allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadArray(f"{self.member}: no array ({' '.join(str(error).split())[:80]})") from error
        if found.shape != self.shape or found.dtype.kind != "f":
            raise BadArray(f"{self.member}: is {found.dtype} {found.shape}, and should be floats {self.shape}")
        if not np.isfinite(found).all():
            raise BadArray(f"{self.member}: holds what is not finite")
        return found.astype(np.float32)


@dataclass(frozen=True)
class SampleSpec:
    """How a sample becomes a row of a batch; sent to every read task.

    Args:
        image_size: side of the square images, pixels; 0 reads no images.
        crop: "center", or "random": a square at a random place of the longer side.
        horizontal_flip: mirror half of the images.
        caption: the member that holds the caption: a suffix ("txt"), a field of a JSON member ("json:caption", which
            may hold a list to choose from), a tuple of these (one that is there is drawn for each sample and epoch),
            or None for images only.
        tokenizer_json: a tokenizer in the `tokenizers` library's JSON, or None. It should add its own start and end
            tokens: they are kept when a caption is cut.
        token_length: tokens per caption; longer captions are cut, shorter ones padded.
        pad_token_id: pads short captions.
        image: the member that holds the image, by suffix; None takes the one that is an image.
        condition_image: the member that holds another image of the same proportions, which is cut in the same way, by
            suffix; None reads none. No colours are mixed when it is resized.
        sizes: whether the original size of each image and the place of its crop are told.
        arrays: what else is read of each sample.
        label: the member with the name of its class, as `caption`'s places are written; None reads none.
        classes: the only captions that count; None: any.
    """

    image_size: int
    crop: str = "center"
    horizontal_flip: bool = False
    caption: str | tuple[str, ...] | None = "txt"
    tokenizer_json: str | None = None
    token_length: int = 77
    pad_token_id: int = 0
    image: str | None = None
    condition_image: str | None = None
    sizes: bool = False
    arrays: tuple[ArraySpec, ...] = ()
    label: str | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.image_size < (0 if self.arrays else 1):
            raise BadRequest(f"data: image_size is {self.image_size}; it must be at least 1 pixel")
        if self.image_size == 0 and (self.condition_image is not None or self.sizes):
            raise BadRequest("data: without images there are no other images and no sizes either")
        if self.crop not in ("center", "random"):
            raise BadRequest(f"data: crop is {self.crop!r}; allowed are 'center' and 'random'")
        if self.tokenizer_json is not None and self.token_length < 1:
            raise BadRequest("data: token_length must be at least 1")

    @property
    def row_bytes(self) -> int:
        """Of the image and the arrays of one sample in a batch."""
        return 3 * self.image_size**2 + 4 * sum(math.prod(array.shape) for array in self.arrays)

    def choose_image(self, members: Mapping[str, bytes]) -> tuple[bytes | None, str]:
        """The image's bytes, or None and the reason why there is none."""
        usual = (suffix for suffix in IMAGE_SUFFIXES if suffix in members and suffix != self.condition_image)
        present = [self.image] if self.image else [*usual]
        if len(present) > 1:
            return None, f"image: several members ({', '.join(present)}); name one with data.image"
        if not present or present[0] not in members:
            return None, f"image: {self.image or 'missing'}{' is missing' if self.image else ''}"
        return members[present[0]], ""

    def choose_caption(self, members: Mapping[str, bytes], draw: float) -> str:
        """One of the captions that are there, by `draw` in (0, 1). Raises BadCaption where none is."""
        places = (self.caption,) if isinstance(self.caption, str) else self.caption or ()
        found: list[str] = []
        reason = ""
        for place in places:
            try:
                found += _captions_at(place, members)
            except BadCaption as error:
                reason = reason or str(error)
        if self.classes is not None and (others := [caption for caption in found if caption not in self.classes]):
            found = [caption for caption in found if caption in self.classes]
            reason = reason or f"caption: {others[0][:60]!r} is not one of objective.classes"
        if not found:
            raise BadCaption(reason)
        return found[min(int(draw * len(found)), len(found) - 1)]

    def read_label(self, members: Mapping[str, bytes]) -> str:
        """The name of the sample's class, "" where it has none: that is no reason to leave the sample out."""
        suffix, _, name = (self.label or "").partition(":")
        try:
            text = members[suffix].decode("utf-8")
            found = json.loads(text)[name] if name else text
        except (KeyError, ValueError, TypeError, RecursionError):
            return ""
        return str(found).strip().encode("utf-8", "ignore").decode()  # half of an emoji cannot be handed on

    def tokenize(self, caption: str) -> NDArray[np.int32]:
        """Token ids, int32 (token_length,)."""
        assert self.tokenizer_json is not None
        ids = _tokenizer(self.tokenizer_json, self.token_length).encode(caption).ids
        row = np.full(self.token_length, self.pad_token_id, np.int32)
        row[: len(ids)] = ids
        return row


def _captions_at(place: str, members: Mapping[str, bytes]) -> list[str]:
    suffix, _, name = place.partition(":")
    if suffix not in members:
        raise BadCaption(f"caption: no {suffix} member")
    try:
        text = members[suffix].decode("utf-8")
        value = json.loads(text).get(name) if name else text
    except UnicodeDecodeError as error:
        raise BadCaption("caption: not UTF-8") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadCaption(f"caption: {suffix} member is no JSON object") from error
    texts = value if isinstance(value, list) else [value]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if any(_SURROGATE.search(text) for text in captions):  # half of an emoji, which JSON can write
        raise BadCaption("caption: not Unicode")
    if not captions:
        raise BadCaption("caption: missing" if value is None else "caption: empty")
    return captions


@lru_cache(4)
def _tokenizer(tokenizer_json: str, token_length: int) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(token_length)
    return tokenizer
