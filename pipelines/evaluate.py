"""Measure a model: does it draw what it is asked for, and as variously as reality?

python pipelines/evaluate.py models:/ldm-demo/1 --set digits --count 1000 --report out/report.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="an export's folder, a training run's folder, or models:/NAME/VERSION or @ALIAS")
    add("--set", default="digits", choices=["digits"], help="what to measure on (default: %(default)s)")
    add("--count", type=int, default=1000, help="pictures to draw, a multiple of 20 (default: %(default)s)")
    add("--seed", type=int, default=0, help="picture i is drawn from seed·count + i (default: %(default)s)")
    add("--num-steps", type=int, default=20, help="denoiser steps for each picture (default: %(default)s)")
    add("--guidance-scale", type=float, default=2.0, help="1 is no guidance (default: %(default)s)")
    add("--sampler", default="ddim", choices=["ddpm", "ddim", "dpm_solver++"], help="(default: %(default)s)")
    add("--batch-size", type=int, default=64, help="pictures drawn at once (default: %(default)s)")
    add(
        "--processes",
        type=int,
        default=1,
        help="above 1: of one core each (default: %(default)s, on all cores)",
    )
    add("--tracking-uri", help="MLflow server for models:/… (default: MLFLOW_TRACKING_URI, else the local one)")
    add("--report", metavar="FILE", help="write a page to look at (HTML, self-contained)")
    add("--grid", metavar="FILE", help="write a labelled grid of the first two pictures of each combination (PNG)")
    add("--facts", metavar="FILE", help="JSON object of facts about the run, for the report")
    add(
        "--history",
        metavar="FILE",
        help="JSON for the report: rows of step, loss, validation_loss; or {training: rows}",
    )
    add("--summary", metavar="FILE", help="write figures and paths as one JSON object")
    arguments = parser.parse_args()

    from pipelines.evaluation import evaluate_model  # imported late, so that --help is quick

    evaluate_model(arguments)


if __name__ == "__main__":
    main_exit(main)
