"""Small shards for the data tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.index import DatasetIndex, load_index
from pipelines.data.write import ShardWriter


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def numbered_image(number: int, size: int = 8) -> np.ndarray:
    """An image that is unlike that of every other number below 2^24."""
    colour = [number & 255, number >> 8 & 255, number >> 16 & 255]
    return np.broadcast_to(np.array(colour, np.uint8), (size, size, 3)).copy()


def write_shards(folder: Path, samples: int, per_shard: int, chunk_samples: int = 32) -> DatasetIndex:
    with ShardWriter(str(folder), per_shard, chunk_samples) as writer:
        for number in range(samples):
            members = {"png": encode(numbered_image(number)), "txt": f"number {number}".encode()}
            writer.write(f"{number:06d}", members)
    return load_index(str(folder), build=False)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    """A tar with these members as they are, written by Python's tarfile."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` good samples."""
    members = []
    for number in range(first, first + count):
        members += [(f"{number:04d}.png", encode(numbered_image(number))), (f"{number:04d}.txt", b"number %d" % number)]
    return members
