"""Measure a model that draws, or a folder of pictures, against real pictures: figures with intervals, and a page.

    python pipelines/evaluate.py models:/ldm-demo/1
    python pipelines/evaluate.py RUN --count 10000 --features dinov2:facebook/dinov2-base --clip FOLDER
    python pipelines/evaluate.py PICTURES --data SHARDS/held_out --features inception:WEIGHTS

Real pictures are the held-out shards of the run that trained the model; those of the training show what it copied.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.evaluation.command import argument_parser, evaluate_model


def main() -> None:
    evaluate_model(argument_parser(__doc__ or "").parse_args())


if __name__ == "__main__":
    main_exit(main)
