"""Every loss, penalty and network of GANs, image to image, few labels, and AttnGAN: each trained on a small real task.

make demo-gan-variants                        the same, with the set-up before it
python pipelines/demo/gan_variants.py --out out/demo-gan-variants.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SOURCES = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCES))

from rich.console import Console
from rich.table import Table

from genmodels.families import members_of
from infra.errors import main_exit
from infra.storage import run_root
from pipelines.demo.command import parse
from pipelines.demo.digits import WORDS
from pipelines.demo.evaluation import evaluate_digits, mean_coverage
from pipelines.demo.judge import Judge, average_to, find_strokes
from pipelines.demo.run import Stages, check_overrides, prepare
from pipelines.demo.strokes import digits_of, draw_strokes, labelled, stroke_overlap
from pipelines.demo.variants import train_at_once
from pipelines.training.config import load_config

SIDE_BY_SIDE = ("gan_variants_losses", "gan_variants_networks")
TRANSLATIONS = ("pix2pix_demo", "cycle_gan_demo")
TEXT = ("damsm_variants", "attn_gan_variants")
SCRIPT = "python pipelines/train_gan.py"
LEAST = 0.5  # of the way from chance to the real data's figure: below it, a variant has not learnt
_SHOWN = 10  # pictures of each variant in the grid
_CELLS = 8  # of the features in which coverage is measured


def run_variants(out: Path, overrides: list[str], count: int) -> dict[str, Any]:
    """Train, draw, judge; returns the figures and writes them to `out`."""
    began = psutil.Process().create_time()  # of the command, so that imports count
    root, stages = run_root(), Stages()
    check_overrides(overrides)
    configs = {name: load_config(name, overrides) for name in (*SIDE_BY_SIDE, *TRANSLATIONS, *TEXT)}
    size = configs[SIDE_BY_SIDE[0]].objective.image_size
    written = [
        f"{root}/data/strokes-{size} --demo strokes --size {size}",
        f"{root}/data/digits-{size} --demo digits --size {size}",
    ]

    def write_shards() -> None:
        prepare(root, [configs[name] for name in TEXT])
        prepare(root, [configs[name] for name in (*SIDE_BY_SIDE, *TRANSLATIONS)], 3, "strokes")

    stages.run("shards", " & ".join(f"python pipelines/prepare_shards.py {each}" for each in written), write_shards)

    def train(stage: str, *names: str) -> dict[str, dict[str, Any]]:
        typed = " & ".join(f"{SCRIPT} {name}" for name in names)
        return stages.run(stage, typed, lambda: train_at_once({name: configs[name] for name in names}))

    trained = train("losses, networks", *SIDE_BY_SIDE)
    trained |= train("image to image, text and image encoder", *TRANSLATIONS, TEXT[0])
    trained |= train("AttnGAN", TEXT[1])
    judged = stages.run(
        "pictures and judgement",
        f"python pipelines/generate.py --model {root}/RUN/export/STEP/MEMBER",
        lambda: judge_all(trained, configs, size, count),
    )
    rows, pictures = [row for row, _ in judged], {row["variant"]: drawn for row, drawn in judged}
    for row in rows:
        row["way"] = (row["figure"] - row["chance"]) / (row["real"] - row["chance"])
        row["learnt"] = row["way"] >= LEAST
    grid = out.parent / "demo-gan-variants.png"
    draw_grid(pictures).save(grid)
    summary = {
        "seconds": time.time() - began,
        "variants": rows,
        "lowest_way": min(row["way"] for row in rows),
        "count": count,
        "grid": str(grid),
        "mlflow_run_ids": {name: each["mlflow_run_id"] for name, each in trained.items()},
        "tracking_uri": next(iter(trained.values()))["tracking_uri"],
        "seconds_by_part": stages.seconds,
    }
    out.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def judge_all(
    trained: dict[str, dict[str, Any]], configs: dict[str, Any], size: int, count: int
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """A row of figures for each variant, and pictures of it, uint8 (10, size, size, 3)."""
    judge = Judge.train(size)
    found = []
    for preset in SIDE_BY_SIDE:
        for name, member in members_of(configs[preset].objective).items():
            folder, figures = Path(trained[preset]["export"]) / name, trained[preset]["figures"]
            row = {"variant": name, "seconds": _seconds(figures, f"{name}-"), "export": str(folder)}
            if member.semi_supervised is not None:
                own = few_labels(judge, size, figures[f"val_{name}/class_accuracy"])
                found.append(({**row, **own}, _drawn(folder, None, _SHOWN)))
            else:
                drawn = _drawn(folder, member.classes, count)
                found.append(({**row, **of_digits(drawn, judge, size, member.classes is not None)}, drawn[:_SHOWN]))
    for preset in TRANSLATIONS:
        folder = Path(trained[preset]["export"])
        directions = ("ab",) if preset == "pix2pix_demo" else ("ab", "ba")
        for direction in directions:
            row, drawn = of_strokes(folder, size, direction)
            seconds = _seconds(trained[preset]["figures"])
            name = f"{configs[preset].objective.kind}, {row.pop('from')}"
            found.append(({"variant": name, "seconds": seconds, "export": str(folder), **row}, drawn))
    found.append(of_sentences(trained[TEXT[1]], count))
    return found


def of_digits(drawn: np.ndarray, judge: Judge, size: int, told: bool) -> dict[str, Any]:
    """How many show the digit that was asked for, 0 … 9 in turn; or, where none was, how many held-out digits have a
    drawn one near them."""
    held_out, train = draw_strokes("held_out", size), draw_strokes("train", size)
    random = np.random.default_rng(0)
    covered = _covered(held_out, drawn, random)
    if not told:
        real = _covered(held_out, train, random)
        alone = _covered(held_out, np.repeat(train[:1], len(drawn), axis=0), random)
        return {"task": "digits covered", "figure": covered, "chance": alone, "real": real, "coverage": covered}
    right = judge(drawn).digit == np.arange(len(drawn)) % 10
    real = judge(held_out).digit == digits_of("held_out")
    return {
        "task": "the digit asked for",
        "figure": float(right.mean()),
        "chance": 0.1,
        "real": float(real.mean()),
        "coverage": covered,
    }


def few_labels(judge: Judge, size: int, accuracy: float) -> dict[str, Any]:
    """How many held-out digits the discriminator names; and what the labels give without it."""
    from sklearn.svm import SVC

    digits, known = digits_of("train"), labelled(digits_of("train"))
    train, held_out = (_features(draw_strokes(split, size)) for split in ("train", "held_out"))
    alone = SVC(C=10.0).fit(train[known], digits[known]).predict(held_out) == digits_of("held_out")
    real = judge(draw_strokes("held_out", size)).digit == digits_of("held_out")
    return {
        "task": "held-out digits named, 10 labels a class",
        "figure": accuracy,
        "chance": 0.1,
        "real": float(real.mean()),
        "labels_alone": float(alone.mean()),
    }


def of_strokes(folder: Path, size: int, direction: str) -> tuple[dict[str, Any], np.ndarray]:
    """How far strokes that are made of held-out ones overlap with what they should be; chance is to do nothing."""
    from genmodels.gan.translation import TranslationModel

    sides = [draw_strokes("held_out", size, weight) for weight in ("thin", "bold")]
    given, wanted = sides if direction == "ab" else sides[::-1]
    drawn = TranslationModel.from_folder(folder).draw(None, list(range(len(given))), images=given, direction=direction)
    figures = {
        "task": "strokes that overlap",
        "from": "thin to bold" if direction == "ab" else "bold to thin",
        "figure": float(stroke_overlap(drawn, wanted).mean()),
        "chance": float(stroke_overlap(given, wanted).mean()),
        "real": 1.0,
    }
    pairs = np.stack([given, drawn], axis=1)[: _SHOWN // 2].reshape(-1, size, size, 3)
    return figures, pairs


def of_sentences(trained: dict[str, Any], count: int) -> tuple[dict[str, Any], np.ndarray]:
    """How many pictures of kept-out combinations are right in digit, ink and paper."""
    from genmodels.drawing import open_drawing_model

    model: Any = open_drawing_model(Path(trained["export"]))
    found = evaluate_digits(lambda prompts, seeds: model.draw(prompts, seeds), model.image_size, count)
    row = {
        "variant": "attn_gan",
        "seconds": _seconds(trained["figures"]),
        "export": trained["export"],
        "task": "digit, ink and paper of sentences",
        "figure": found.figures["consistency"],
        "chance": found.figures["consistency_chance"],
        "real": found.figures["consistency_real"],
        "coverage": found.figures["coverage"],
    }
    return row, found.pictures[:_SHOWN]


def _drawn(folder: Path, classes: list[str] | None, count: int) -> np.ndarray:
    from genmodels.gan.pipeline import GanModel

    prompts = None if classes is None else [WORDS[number % 10] for number in range(count)]
    return GanModel.from_folder(folder).draw(prompts, list(range(count)))


def _features(pictures: np.ndarray) -> np.ndarray:
    return average_to(find_strokes(pictures).mask, _CELLS)


def _covered(held_out: np.ndarray, drawn: np.ndarray, random: np.random.Generator) -> float:
    return mean_coverage(_features(held_out), _features(drawn), random)[1]


def _seconds(figures: dict[str, float], member: str = "") -> float:
    """Spent in the updates of both networks."""
    return sum(value for name, value in figures.items() if name.startswith(f"seconds_{member}"))


def draw_grid(pictures: dict[str, np.ndarray]) -> Any:
    """A row for each variant; of image to image, what is given and what is made of it in turn."""
    from PIL import Image

    from pipelines.pictures import grid_png

    largest = max(drawn.shape[1] for drawn in pictures.values())
    rows, titles = [], []
    for name, drawn in pictures.items():
        side = (largest, largest)
        rows += [np.asarray(Image.fromarray(each).resize(side, Image.Resampling.NEAREST)) for each in drawn]
        titles += [name.replace("_", " "), *[""] * (len(drawn) - 1)]
    return grid_png(np.stack(rows), titles, columns=_SHOWN)


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, 120)  # narrower, and figures would be cut
    table = Table(title=f"GANs on small tasks, {summary['count']} pictures each", padding=(0, 1, 0, 0))
    for column in ("variant", "task"):
        table.add_column(column)
    for column in ("figure", "chance", "real data", "of the way", "coverage", "seconds"):
        table.add_column(column, justify="right")
    for row in summary["variants"]:
        table.add_row(
            row["variant"], row["task"], f"{row['figure']:.3f}", f"{row['chance']:.3f}", f"{row['real']:.3f}",
            f"{row['way']:.2f}" + ("" if row["learnt"] else " !"),
            f"{row['coverage']:.3f}" if "coverage" in row else "", f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    if not all(row["learnt"] for row in summary["variants"]):
        console.print(f"! less than {LEAST} of the way from chance to real data: it has not learnt", highlight=False)
    few = next(row for row in summary["variants"] if "labels_alone" in row)
    console.print(f"from the labels alone, without the other images: {few['labels_alone']:.3f}", highlight=False)


def main() -> None:
    arguments = parse(__doc__, "demo-gan-variants", 500, "for all trainings")
    summary = run_variants(arguments.out, arguments.overrides, arguments.count)
    show(summary)
    print(f"\n── done in {summary['seconds']:.0f} s\n   pictures   {summary['grid']}\n   figures    {arguments.out}")


if __name__ == "__main__":
    main_exit(main)
