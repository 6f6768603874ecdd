"""What the stages of the demo's unCLIP are worth: each is compared with what could stand in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genmodels.diffusion.image_condition import reduced, upsampled
from genmodels.diffusion.pipeline import to_pixels
from genmodels.metrics.frechet import sample_frechet_distance
from genmodels.metrics.image import psnr
from genmodels.unclip.pipeline import TEXT_EMBEDDING, TEXT_ONLY, Unclip
from pipelines.demo.classifier import digits_extractor
from pipelines.demo.digits import COLOURS, Combination, caption
from pipelines.demo.evaluation import correct, kept_out_prompts, real_pictures
from pipelines.demo.judge import Judge
from pipelines.demo.parallel_draw import DrawingPool
from pipelines.pictures import grid_png

_SHOWN = 40  # pictures in the grid
_GIVEN = 8  # real pictures that are varied
_VARIATIONS = 6  # of each, beside itself
_STEPS = 8  # of an interpolation
_JUDGED = 100  # real pictures whose variations are judged, and pairs that are interpolated
_PARTS = ("digit", "ink", "paper", "all")


def judge_unclip(folder: Path, count: int, out: Path) -> dict[str, Any]:
    """Figures of the joined model in `folder` on `count` kept-out prompts; grids are written to `out`."""
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    model = Unclip.from_folder(folder, precision="auto")
    judge = Judge.train(model.image_size)
    drawn, figures = _judge_arms(model, folder, judge, count)
    captions = kept_out_prompts(count)[1]
    figures |= _retrieval(model, drawn)
    figures |= _upsampler(model)
    figures |= _variations(model, judge, figures["consistency_real"], out)
    number = min(_SHOWN, count)
    grid = out / "grid.png"
    grid_png(drawn[:number], captions[:number]).save(grid)
    return {**figures, "grid": str(grid)}


def _judge_arms(model: Unclip, folder: Path, judge: Judge, count: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The pictures of the whole model, and how often each way from a sentence to a picture is right."""
    wanted, captions = kept_out_prompts(count)
    real = [real_pictures("held_out", model.image_size, which) for which in (0, 1)]
    real_right = correct(judge(np.concatenate([real[0][0], real[1][0]])), real[0][1] + real[1][1])
    first, *others = model.priors
    # What the decoder is told in place of a caption is compared without one, and without guidance, which would hide
    # most of what an embedding lacks.
    usual = model.settings["decoder"]["guidance_scale"]
    arms: list[tuple[str, str, str, bool, float]] = [("whole", f"{first} and caption", first, True, usual)]
    arms += [(name, name.replace("_", " "), name, False, 1.0) for name in (first, *others)]
    arms.append(("text_embedding", "the text's embedding", TEXT_EMBEDDING, False, 1.0))
    if model.decoder.conditional:
        arms.append(("text_only", "caption alone", TEXT_ONLY, True, usual))
    seeds, right, pictures = list(range(count)), {}, {}
    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        DrawingPool(folder, psutil.cpu_count(logical=False) or 1, model.precision) as pool,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        row = bar.add_task("pictures", total=count * len(arms))
        for number, (name, _, by, told, guidance_scale) in enumerate(arms):

            def progress(done: float, _total: int, number: int = number) -> None:
                bar.update(row, completed=int(number * count + done))

            options = {"by": by, "tell_captions": told, "guidance_scale": guidance_scale}
            pictures[name] = pool.draw(captions, seeds, progress, **options)
            right[name] = correct(judge(pictures[name]), wanted)
    real_all = float(real_right["all"].mean())
    rows = [
        {
            "told": title,
            "guidance_scale": guidance_scale,
            **{part: float(right[name][part].mean()) for part in _PARTS},
            "ratio": float(right[name]["all"].mean()) / real_all,
        }
        for name, title, _, _, guidance_scale in arms
    ]
    rows.append(
        {
            "told": "(real digits)",
            "guidance_scale": None,
            **{part: float(real_right[part].mean()) for part in _PARTS},
            "ratio": 1.0,
        }
    )
    ratios = {name: float(right[name]["all"].mean()) / real_all for name, *_ in arms}
    gain = right[first]["all"].astype(float) - right["text_embedding"]["all"]
    half = 1.96 * float(gain.std(ddof=1)) / count**0.5
    figures = {
        "count": count,
        "consistency_real": real_all,
        "consistency_ratio": ratios["whole"],
        "consistency_ratio_prior": ratios[first],
        "consistency_ratio_ar_prior": next((ratios[name] for name in others), None),
        "consistency_ratio_text_embedding": ratios["text_embedding"],
        "consistency_ratio_text_only": ratios.get("text_only"),
        "prior_gain": float(gain.mean()),
        "prior_gain_interval": [float(gain.mean()) - half, float(gain.mean()) + half],
        "arms": rows,
    }
    return pictures["whole"], figures


def _retrieval(model: Unclip, drawn: np.ndarray) -> dict[str, Any]:
    """How often the right one of one caption for each combination is the nearest to a picture: real ones of held-out
    writers in kept-out combinations, and drawn ones."""
    combinations = [Combination(digit, ink, paper) for digit in range(10) for ink in COLOURS for paper in COLOURS]
    combinations = [each for each in combinations if each.ink != each.paper]
    rng = np.random.default_rng(0)
    texts = model.clip.read_texts(model.clip.tokens([caption(*each, rng) for each in combinations]))[2]
    real = [real_pictures("held_out", model.image_size, which) for which in (0, 1)]
    given, wanted = np.concatenate([real[0][0], real[1][0]]), real[0][1] + real[1][1]

    def nearest(pictures: np.ndarray) -> list[Combination]:
        parts = [model.embed_pictures(part, len(part)) for part in np.array_split(pictures, -(-len(pictures) // 256))]
        return [combinations[number] for number in (torch.cat(parts) @ texts.T).argmax(1).tolist()]

    found = nearest(given)
    shares = {
        part: np.mean([getattr(a, part) == getattr(b, part) for a, b in zip(found, wanted)]) for part in _PARTS[:3]
    }
    return {
        "captions": len(combinations),
        "clip_pictures": len(wanted),
        "clip_recall_at_1": float(np.mean([one == other for one, other in zip(found, wanted, strict=True)])),
        **{f"clip_{part}": float(share) for part, share in shares.items()},
        "clip_recall_at_1_drawn": float(
            np.mean([one == other for one, other in zip(nearest(drawn), kept_out_prompts(len(drawn))[0], strict=True)])
        ),
    }


def _upsampler(model: Unclip) -> dict[str, Any]:
    """Real held-out pictures made small and large again, by the upsamplers and by bicubic interpolation."""
    pictures = real_pictures("held_out", model.image_size, 0)[0]
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = reduced(images, model.image_size // model.decoder.image_size)
    bicubic, seeds = upsampled(small, model.image_size), list(range(len(images)))
    ours, shuffled = (model.upsample(given, seeds) for given in (small, small.roll(1, 0)))
    extractor = digits_extractor()
    features = {
        name: extractor(to_pixels(each)).features
        for name, each in (("real", images), ("ours", ours), ("bicubic", bicubic), ("shuffled", shuffled))
    }
    distances = {
        name: sample_frechet_distance(features["real"], found) for name, found in features.items() if name != "real"
    }
    decibels = {
        name: float(psnr(each, images).mean())
        for name, each in (("ours", ours), ("bicubic", bicubic), ("shuffled", shuffled))
    }
    return {
        "upsampler_psnr": decibels["ours"],
        "bicubic_psnr": decibels["bicubic"],
        "upsampler_psnr_gain": decibels["ours"] - decibels["bicubic"],
        "upsampler_psnr_shuffled": decibels["shuffled"],
        "upsampler_frechet_distance": float(distances["ours"]),
        "bicubic_frechet_distance": float(distances["bicubic"]),
    }


def _variations(model: Unclip, judge: Judge, real_right: float, out: Path) -> dict[str, Any]:
    """Variations of real pictures and paths between two of them: how often they are what they should be, and grids."""
    pictures, wanted = real_pictures("held_out", model.image_size, 0)
    step = len(pictures) // _JUDGED
    chosen = np.arange(_JUDGED) * step
    given, asked = pictures[chosen], [wanted[i] for i in chosen]
    varied = model.variations(given, list(range(_JUDGED)))
    kept = correct(judge(varied), asked)
    others = np.roll(np.arange(_JUDGED), 7)
    ends = [model.variations(given[order], [0] * _JUDGED) for order in (np.arange(_JUDGED), others)]
    right = [
        correct(judge(end), [asked[i] for i in order])["all"]
        for end, order in zip(ends, (np.arange(_JUDGED), others), strict=True)
    ]
    # One of each of the first digits, so that the eye sees many.
    rows = [next(i for i in range(_JUDGED) if asked[i].digit == digit) for digit in range(_GIVEN)]
    shown, titles = [], []
    for number in rows:
        again = model.variations(np.repeat(given[number : number + 1], _VARIATIONS, 0), list(range(_VARIATIONS)))
        shown += [given[number], *again]
        titles += [f"real: {asked[number].ink} {asked[number].digit} on {asked[number].paper}", *[""] * _VARIATIONS]
    variations = out / "variations.png"
    grid_png(np.stack(shown), titles, columns=1 + _VARIATIONS).save(variations)
    paths, titles = [], []
    for number, last in zip(rows, rows[3:] + rows[:3], strict=True):
        one, other = given[number], given[last]
        paths += [one, *model.interpolate(one, other, _STEPS, seed=number), other]
        titles += ["real", *[f"{share:.2f}" for share in np.linspace(0, 1, _STEPS)], "real"]
    interpolation = out / "interpolation.png"
    grid_png(np.stack(paths), titles, columns=_STEPS + 2).save(interpolation)
    return {
        "variation_consistency": float(kept["all"].mean()),
        "variation_consistency_ratio": float(kept["all"].mean()) / real_right,
        **{f"variation_{part}": float(kept[part].mean()) for part in _PARTS[:3]},
        "interpolation_ends": float((right[0] & right[1]).mean()),
        "variations": str(variations),
        "interpolation": str(interpolation),
    }
