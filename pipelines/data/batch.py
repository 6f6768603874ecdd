"""A rank's batch as tensors."""

from __future__ import annotations

from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.data.spec import SampleSpec


class RankBatch(TypedDict):
    """One step's samples of one rank, in the order's sequence."""

    weight: Tensor  # float32 (batch,): 1, or 0 for a quarantined or padding sample
    seeds: Tensor  # int64 (batch,)
    keys: list[str]  # shard/key
    captions: list[str]
    labels: NotRequired[list[str]]  # where the spec names their member; "" where a sample has none
    reasons: list[str]  # why quarantined; empty for a good sample
    step: int
    images: NotRequired[Tensor]  # uint8 (batch, 3, height, width), unless the spec reads none
    image_embeddings: NotRequired[Tensor]  # float32 (batch, embedding_dim), an array of the samples
    latent_moments: NotRequired[Tensor]  # float32 (batch, 2·channels, height, width), likewise
    token_ids: NotRequired[Tensor]  # int64 (batch, token_length), where the spec has a tokenizer
    condition_images: NotRequired[Tensor]  # uint8 like images, where the spec names a member
    other: NotRequired[RankBatch]  # the step's samples of the second set, where the run learns from two
    sizes: NotRequired[Tensor]  # int32 (batch, 4), where asked for: original height and width, rows and columns cut off


def to_batch(table: pa.Table, spec: SampleSpec) -> RankBatch:
    """A table of `read.build_batch` as tensors, copied out of the object store."""
    table = table.combine_chunks()
    count, size = table.num_rows, spec.image_size

    def fixed(name: str, dtype: type, *shape: int) -> np.ndarray:
        column = table[name].chunk(0)
        width = column.type.byte_width
        raw = np.frombuffer(column.buffers()[1], np.uint8, count * width, column.offset * width)
        return raw.view(dtype).reshape(count, *shape)

    batch: RankBatch = {
        "weight": torch.from_numpy(table["weight"].to_numpy().copy()),
        "seeds": torch.from_numpy(table["seed"].to_numpy().copy()),
        "keys": table["key"].to_pylist(),
        "captions": table["caption"].to_pylist(),
        "reasons": table["reason"].to_pylist(),
        "step": table["step"][0].as_py(),
    }
    if spec.label is not None:
        batch["labels"] = table["label"].to_pylist()
    if size:
        batch["images"] = torch.from_numpy(fixed("image", np.uint8, 3, size, size).copy())
    for array in spec.arrays:
        batch[array.name] = torch.from_numpy(fixed(array.name, np.float32, *array.shape).copy())  # type: ignore[literal-required]
    if spec.tokenizer_json is not None:
        batch["token_ids"] = torch.from_numpy(fixed("token_ids", np.int32, spec.token_length).astype(np.int64))
    if spec.condition_image is not None:
        batch["condition_images"] = torch.from_numpy(fixed("condition_image", np.uint8, 3, size, size).copy())
    if spec.sizes:
        batch["sizes"] = torch.from_numpy(fixed("size", np.int32, 4).copy())
    return batch
