"""Judge a model of digits: does it draw combinations that it never saw as asked for, and as variously as reality?

    python pipelines/demo/judge_model.py models:/ldm-demo/1 --count 1000 --report out/report.html

`pipelines/evaluate.py` measures any model; this is the demo's own examination, with captions that were kept out of all
training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from infra.errors import main_exit
from pipelines.demo.judgement import argument_parser, judge_model


def main() -> None:
    judge_model(argument_parser(__doc__ or "").parse_args())


if __name__ == "__main__":
    main_exit(main)
