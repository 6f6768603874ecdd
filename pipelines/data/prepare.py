"""Where samples come from that are made into shards: a folder of images, or a table that names them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import BadRequest
from infra.storage import exists, join
from pipelines.data.decode import IMAGE_SUFFIXES
from pipelines.data.index import DatasetIndex
from pipelines.data.write import ShardWriter

_SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class RawSample:
    """A sample that is still on disk: its key, the image file, the caption (None: no captions) and other facts."""

    key: str
    image: Path
    caption: str | None
    facts: dict[str, Any]


def _key(name: str) -> str:
    # webdataset ends a key at the first dot of its last part.
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.replace('.', '_')}"


def folder_samples(folder: Path, captions: bool = True) -> list[RawSample]:
    """Every image under `folder`, sorted; the caption of `x.jpg` is `x.txt`.

    Raises BadRequest where there is no image, or (with `captions`) an image has no text beside it.
    """
    if not folder.is_dir():
        raise BadRequest(f"{folder} is not a folder; name one that holds images")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not images:
        raise BadRequest(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    without = [path for path in images if captions and not path.with_suffix(".txt").is_file()]
    if without:
        raise BadRequest(
            f"{len(without)} of {len(images)} images in {folder} have no caption, first {without[0].name}: write "
            f"{without[0].stem}.txt beside it, give a table with --table, or take --no-captions"
        )
    samples, seen = [], set()
    for number, path in enumerate(images):
        key = _key(path.relative_to(folder).with_suffix("").as_posix())
        key = f"{key}-{number:09d}" if key in seen else key  # x.png beside x.jpg, a.b.png beside a_b.png
        seen.add(key)
        samples.append(RawSample(key, path, _read_text(path.with_suffix(".txt")) if captions else None, {}))
    return samples


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8; save it as UTF-8") from error


def table_samples(table: Path, folder: Path, image_column: str, caption_column: str | None) -> list[RawSample]:
    """The rows of a CSV, JSONL or Parquet table; image paths are relative to `folder`, other columns become facts.

    Raises BadRequest where a column or an image is not there.
    """
    rows = list(_rows(table))
    if not rows:
        raise BadRequest(f"{table} holds no rows")
    for column in filter(None, (image_column, caption_column)):
        if column not in rows[0]:
            raise BadRequest(f"{table} has no column {column!r}; it has {', '.join(sorted(rows[0]))}")
    samples, seen = [], set()
    for number, row in enumerate(rows):
        name = str(row[image_column])
        if not (folder / name).is_file():
            raise BadRequest(f"{table}, row {number + 1}: there is no image {folder / name}")
        key = _key(Path(name).with_suffix("").as_posix().lstrip("/"))
        key = f"{key}-{number:09d}" if key in seen or ".." in Path(name).parts else key
        seen.add(key)
        facts = {column: value for column, value in row.items() if column not in (image_column, caption_column)}
        caption = str(row[caption_column] or "").strip() if caption_column else None
        samples.append(RawSample(key, folder / name, caption, facts))
    return samples


def _rows(table: Path) -> Iterable[dict[str, Any]]:
    if not table.is_file():
        raise BadRequest(f"there is no table {table}")
    kind = table.suffix.lower()
    try:
        if kind == ".csv":
            with table.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        if kind in (".jsonl", ".ndjson"):
            return [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        if kind == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(table).to_pylist()
    except (ValueError, OSError) as error:
        raise BadRequest(f"{table} cannot be read as {kind.lstrip('.')}: {error}") from error
    raise BadRequest(f"{table}: allowed tables are .csv, .jsonl and .parquet")


def is_held_out(key: str, share: float) -> bool:
    """Whether a sample is in the held-out split: by a hash of its key, so that later samples move nothing."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def encode(sample: RawSample) -> dict[str, bytes]:
    """The members of a sample: the image's own bytes, its caption as `txt`, and its facts as `json`."""
    suffix = sample.image.suffix.lower().lstrip(".")
    members = {"jpg" if suffix == "jpeg" else suffix: sample.image.read_bytes()}
    if sample.caption is not None:
        members["txt"] = sample.caption.encode()
    if sample.facts:
        members["json"] = json.dumps(sample.facts, ensure_ascii=False, default=str).encode()
    return members


def write_samples(
    samples: list[RawSample], out: str, held_out: float, shard_samples: int, overwrite: bool
) -> dict[str, DatasetIndex]:
    """Write OUT/train and, where `held_out` (a share, 0 to 1) is above 0, OUT/held_out; shows progress."""
    from rich.progress import track

    if not 0 <= held_out < 1:
        raise BadRequest(f"--held-out is {held_out}; it is a share, at least 0 and below 1")
    groups = {"train": [sample for sample in samples if not is_held_out(sample.key, held_out)]}
    if held_out:
        groups["held_out"] = [sample for sample in samples if is_held_out(sample.key, held_out)]
        if not groups["held_out"] or not groups["train"]:
            raise BadRequest(
                f"--held-out {held_out} leaves one split of {len(samples)} images empty; give another share"
            )
    indices = {}
    for split, members in groups.items():
        writer = ShardWriter(f"{out.rstrip('/')}/{split}", shard_samples, overwrite=overwrite)
        for sample in track(members, description=f"writing {split}"):
            writer.write(sample.key, encode(sample))
        indices[split] = writer.close()
    return indices


def digits_complete(out: str) -> bool:
    """Whether `write_digits` went to its end there: each split's index is written last."""
    return all(exists(join(out, split, "index.json")) for split in _SPLITS)


def write_digits(out: str, size: int, repeats: int, shard_samples: int, overwrite: bool) -> dict[str, DatasetIndex]:
    """Write the demo's digits, `size` pixels square, each digit `repeats` times, to OUT/train and OUT/held_out."""
    import io

    from PIL import Image
    from rich.progress import track

    from pipelines.demo.digits import draw_split

    def encoded(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        for key, image, caption, facts in draw_split(split, size, repeats):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            yield key, {"png": buffer.getvalue(), "txt": caption.encode(), "json": json.dumps(facts).encode()}

    indices = {}
    for split in _SPLITS:
        writer = ShardWriter(f"{out.rstrip('/')}/{split}", shard_samples, overwrite=overwrite)
        for key, members in track(encoded(split), description=f"drawing {split}", total=None):
            writer.write(key, members)
        indices[split] = writer.close()
    return indices
