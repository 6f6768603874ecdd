"""What `generate.py` does: read prompts, open the model, draw, write."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from infra.errors import BadRequest, write_summary
from infra.exports import export_kind, folder_digest, is_unclip
from infra.registry import find_version
from infra.storage import run_root
from pipelines.data.decode import BadImage, decode_image
from pipelines.drawing_options import complete_options, drawing_options
from pipelines.watermark import SMALLEST, embed, read_key

if TYPE_CHECKING:
    import numpy as np

    from genmodels.drawing import DrawingModel

_SEEDS = range(-(2**63), 2**63)
_UNCONDITIONAL_COUNT = 16
_VARIATIONS = 8
OF_UNCLIP = ("by", "to", "from_text", "to_text")


def generate(arguments: argparse.Namespace) -> None:
    """Draw what the arguments of `generate.py` ask for.

    Raises:
        BadRequest: there are no prompts, a setting is out of range, or the model cannot be opened.
    """
    options = drawing_options(arguments)
    if arguments.count is not None and arguments.count < 1:
        raise BadRequest(f"--count must be at least 1, not {arguments.count}")
    if arguments.count is not None and arguments.seeds:
        raise BadRequest("give --count or --seeds: each seed is a picture")
    seeds, key = _read_seeds(arguments.seeds), watermark_key(arguments.watermark)
    folder = find_export(arguments.model, arguments.tracking_uri)
    kind = export_kind(folder)
    if kind != "text_to_image":
        raise BadRequest(f"{arguments.model} is of kind {kind}, which draws nothing by itself; name a diffusion model")
    settings = complete_options(options, folder)
    model = _open(folder, arguments.device, arguments.precision)
    check_room(key, model.image_size)
    whole = is_unclip(folder)
    if not whole and (given := [name for name in OF_UNCLIP if getattr(arguments, name) is not None]):
        raise BadRequest(
            f"--{given[0].replace('_', '-')} is of models of all stages of unCLIP: {arguments.model} is none"
        )
    if whole and arguments.image is not None:
        _vary(model, folder, arguments, settings, seeds, key)
        return
    if whole:
        settings |= {} if arguments.by is None else {"by": arguments.by}
        if arguments.to or arguments.from_text or arguments.to_text:
            raise BadRequest("--to, --from-text and --to-text begin with a picture: name it with --image")
    prompts: list[str] | None = None
    if model.conditional:
        varied = model.takes_embedding and arguments.image is not None and not (arguments.prompts or arguments.file)
        if arguments.count is not None and not varied:
            raise BadRequest("--count is for unconditional models; give each prompt several --seeds instead")
        # A decoder of unCLIP alone draws a picture's embedding also without a caption.
        texts = [""] * (arguments.count or _VARIATIONS) if varied else read_prompts(arguments.prompts, arguments.file)
        pairs = picture_plan(texts, seeds, arguments.seed)
        prompts, drawn_seeds = [text for text, _ in pairs], [seed for _, seed in pairs]
    else:
        if arguments.prompts or arguments.file or arguments.negative:
            raise BadRequest(f"{arguments.model} was trained without captions: give --count or --seeds, and no prompts")
        count = arguments.count or (_UNCONDITIONAL_COUNT if getattr(model, "varies", True) else 1)
        drawn_seeds = seeds or [arguments.seed + i for i in range(count)]
    _check_seeds(drawn_seeds)
    settings |= _given(model, arguments.image, arguments.mask, len(drawn_seeds))
    started = time.perf_counter()
    images = _draw(model, prompts, drawn_seeds, arguments.negative, settings)
    seconds = time.perf_counter() - started

    told = {"image": arguments.image, "mask": arguments.mask, "precision": model.precision}
    kept = {name: value for name, value in settings.items() if name not in ("images", "masks", "embeddings")}
    _finish(folder, arguments, {**kept, **told}, images, prompts, drawn_seeds, seconds, key)


def watermark_key(where: str | None) -> str | None:
    """The key that --watermark names; None without one. Raises BadRequest."""
    return None if where is None else read_key(where)


def check_room(key: str | None, image_size: int) -> None:
    """Raise BadRequest where pictures are too small for the mark that is asked for."""
    if key is not None and image_size < SMALLEST:
        raise BadRequest(f"--watermark needs pictures of {SMALLEST} pixels a side, and this model draws {image_size}")


def _check_seeds(seeds: list[int]) -> None:
    if any(seed not in _SEEDS for seed in seeds):
        raise BadRequest("a seed is a whole number of at most 63 bits")


def _finish(
    folder: Path,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    images: np.ndarray,
    titles: list[str] | None,
    seeds: list[int],
    seconds: float,
    key: str | None,
) -> None:
    """Write the pictures, with the mark of `key` if there is one, and what made them."""
    origin = {"model": arguments.model, "folder": str(folder), "digest": folder_digest(folder)}
    if arguments.model.startswith("models:"):  # an alias may be another version's tomorrow
        version = find_version(arguments.model, arguments.tracking_uri)
        origin["version"] = f"models:/{version.name}/{version.version}"
    out = Path(arguments.out).expanduser().absolute()
    drawn = {**settings, "negative_prompt": arguments.negative}
    summary = {**origin, **drawn, "seconds": round(seconds, 2)}
    facts = {"Model": origin.get("version", arguments.model), "Model digest": origin["digest"]}
    if key is not None:
        images = embed(images, key)
        summary["watermark"] = facts["Watermark"] = "yes"
    summary |= _write(out, images, titles, seeds, facts, drawn)
    write_summary(str(out / "generate.json"), summary)
    write_summary(arguments.summary, summary)
    print(f"{len(images)} pictures in {seconds:.1f} s: {summary['grid']}")


def _vary(
    model: Any,
    folder: Path,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    seeds: list[int],
    key: str | None,
) -> None:
    """What unCLIP makes of a picture: variations, a path to another, or one along a difference of texts.

    Raises:
        BadRequest: a file cannot be read, or arguments do not go together.
    """
    if arguments.prompts or arguments.file or arguments.negative or arguments.by or arguments.mask:
        raise BadRequest(
            "--image of unCLIP takes no prompts, no --by and no --mask: it is drawn by the picture's embedding"
        )
    if (arguments.from_text is None) != (arguments.to_text is None):
        raise BadRequest("--from-text and --to-text go together: the way between them is what is drawn along")
    if arguments.to is not None and arguments.from_text is not None:
        raise BadRequest("--to or --from-text: give one")
    if (arguments.to or arguments.from_text) and len(seeds) > 1:
        raise BadRequest(f"--seeds {arguments.seeds}: all pictures of a path are drawn from one seed; give one")
    count, first = arguments.count or len(seeds) or _VARIATIONS, seeds[0] if seeds else arguments.seed
    if arguments.to is not None or arguments.from_text is not None:
        count, drawn_seeds = arguments.count or _VARIATIONS, [first]
    else:
        drawn_seeds = seeds or [first + i for i in range(count)]
    _check_seeds(drawn_seeds)
    picture = _read_picture("image", arguments.image)
    drawing = {name: value for name, value in settings.items() if name != "batch_size"}
    options = {"drawing": drawing, "batch_size": settings["batch_size"]}
    started = time.perf_counter()
    try:
        if arguments.to is not None:
            images = model.interpolate(picture, _read_picture("to", arguments.to), count, first, **options)
        elif arguments.from_text is not None:
            images = model.text_difference(picture, arguments.from_text, arguments.to_text, count, first, **options)
        else:
            images = model.variations(picture[None].repeat(len(drawn_seeds), axis=0), drawn_seeds, **options)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    told = {name: getattr(arguments, name) for name in ("image", "to", "from_text", "to_text")}
    settings = {**settings, **told, "precision": model.precision}
    seconds = time.perf_counter() - started
    seeds = drawn_seeds * (len(images) // len(drawn_seeds))
    _finish(folder, arguments, settings, images, None, seeds, seconds, key)


def _read_picture(name: str, path: str) -> np.ndarray:
    """A picture as it is, uint8 (height, width, 3). Raises BadRequest where it cannot be read."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(Path(path).expanduser()) as opened:
            return np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise BadRequest(f"--{name} {path}: cannot be read as an image ({error})") from error


def read_prompts(arguments: list[str], file: str | None) -> list[str]:
    """Prompts of the command line, then of `file`; where neither is given, of stdin unless it is a terminal.

    Raises BadRequest where there is none, or the file cannot be read.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"--file {file}: cannot be read as UTF-8 text ({error})") from error
    elif not arguments and not sys.stdin.isatty():
        lines = sys.stdin.read().splitlines()
    prompts = [text.strip() for text in [*arguments, *lines] if text.strip()]
    if not prompts:
        raise BadRequest('no prompts: give some ("a red seven"), or --file FILE, or lines on stdin')
    return prompts


def _read_seeds(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise BadRequest(f"--seeds {text}: write whole numbers with commas between, such as 1,2,3") from error


def picture_plan(prompts: list[str], seeds: list[int], base_seed: int) -> list[tuple[str, int]]:
    """A (prompt, seed) for each picture: every prompt with each of `seeds`, or the i-th with `base_seed` + i.

    >>> picture_plan(["a", "b"], [], 5)
    [('a', 5), ('b', 6)]
    >>> picture_plan(["a", "b"], [1, 2], 0)
    [('a', 1), ('a', 2), ('b', 1), ('b', 2)]
    """
    if seeds:
        return [(prompt, seed) for prompt in prompts for seed in seeds]
    return [(prompt, base_seed + i) for i, prompt in enumerate(prompts)]


def find_export(model: str, tracking_uri: str | None = None) -> Path:
    """The local export of a `models:/…` name, an export's own folder, or a training run (its folder or its name).

    Raises BadRequest where there is none.
    """
    from pipelines.training.export import resolve_reference

    return resolve_reference(model, str(run_root()), tracking_uri)


def _open(folder: Path, device: str | None, precision: str) -> DrawingModel:
    import torch

    from genmodels.drawing import open_drawing_model

    try:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return open_drawing_model(folder, device, precision)
    except (ValueError, OSError) as error:
        raise BadRequest(f"{folder}: {error}") from error


def _given(model: DrawingModel, image: str | None, mask: str | None, count: int) -> dict[str, Any]:
    """`images` and `masks` for `count` pictures, of the size that the model takes; empty for one that takes none.

    Raises:
        BadRequest: a file is missing, cannot be read, or is not what the model takes.
    """
    import numpy as np

    if model.takes_embedding and image is not None:  # a decoder of unCLIP alone: drawn by the picture's embedding
        import torch

        picture = torch.from_numpy(_read_picture("image", image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        if picture.shape[2] != picture.shape[3]:
            raise BadRequest(f"--image {image}: must be square, and is {picture.shape[3]} by {picture.shape[2]} pixels")
        assert model.clip is not None
        return {
            "embeddings": model.clip.embed_images(picture.to(next(model.clip.parameters()).device)).expand(count, -1)
        }
    for name, path, needed in (("image", image, model.given_size), ("mask", mask, model.takes_mask)):
        if bool(path) != bool(needed):
            raise BadRequest(f"this model takes {'an' if name == 'image' else 'a'} --{name} FILE" if needed else
                             f"--{name}: this model takes none")  # fmt: skip
    given: dict[str, Any] = {}
    for name, path, mode in (("images", image, "RGB"), ("masks", mask, "L")):
        if path is None:
            continue
        pixels = np.empty((3, model.given_size, model.given_size), np.uint8)
        try:  # as the data path reads images: upright, over white, the square in the middle
            nearest = mode == "L" or model.takes_map
            decode_image(Path(path).expanduser().read_bytes(), model.given_size, pixels, nearest=nearest)
        except (OSError, BadImage) as error:
            raise BadRequest(f"--{name[:-1]} {path}: cannot be read as an image ({error})") from error
        read = pixels.transpose(1, 2, 0)
        given[name] = np.repeat((read if mode == "RGB" else read.mean(2) > 127)[None], count, axis=0)
    return given


def _draw(
    model: DrawingModel,
    prompts: list[str] | None,
    seeds: list[int],
    negative: str | None,
    settings: dict[str, Any],
) -> np.ndarray:
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task("drawing", total=len(seeds))
        try:
            return model.draw(
                prompts,
                seeds,
                negative_prompts=[negative] * len(seeds) if negative else None,
                progress=lambda done, total: bar.update(row, completed=int(done), total=total),
                **settings,
            )
        except ValueError as error:  # a sampler that cannot take that many steps, say
            raise BadRequest(str(error)) from error


def _write(
    out: Path,
    images: np.ndarray,
    prompts: list[str] | None,
    seeds: list[int],
    origin: dict[str, str],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write the pictures, each with what made it, and their grid into `out`; returns the summary's `out`, `grid` and
    `pictures`."""
    from PIL import Image

    from pipelines.pictures import grid_png, provenance

    out.mkdir(parents=True, exist_ok=True)
    pictures: list[dict[str, Any]] = []
    for number, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        path = out / f"{number:04d}-seed-{seed}.png"
        facts = {**origin, "Prompt": prompts[number] if prompts else None, "Seed": seed, "Settings": settings}
        Image.fromarray(image).save(path, pnginfo=provenance(facts))
        pictures.append({"file": path.name, "prompt": prompts[number] if prompts else None, "seed": seed})
    titles = [f"{picture['prompt'] or ''} (seed {picture['seed']})".strip() for picture in pictures]
    grid = out / "grid.png"
    grid_png(images, titles).save(grid)
    return {"out": str(out), "grid": str(grid), "pictures": pictures}
