"""Measure a model: does it draw what it is asked for, and as variously as reality?

python pipelines/evaluate.py models:/ldm-demo/1 --set digits --count 1000 --report out/report.html
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.evaluation import argument_parser, evaluate_model


def main() -> None:
    evaluate_model(argument_parser(__doc__ or "").parse_args())


if __name__ == "__main__":
    main_exit(main)
