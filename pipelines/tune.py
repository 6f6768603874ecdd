"""Search hyperparameters: train many runs a little, cut off what is worse, write the best one down as a preset.

    python pipelines/tune.py ldm_demo learning_rate
    python pipelines/tune.py my.yaml my_search.yaml data.url=s3://bucket/train search.trials=16 search.at_once=4
    python pipelines/train_ldm.py RUN_ROOT/learning-rate/best.yaml        # the best one goes on from its checkpoint

A search file names keys of the preset and the values that they may take; --help lists its own keys. Random search,
asynchronous successive halving, population-based training, or Optuna. Killed and typed again, it goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.search.command import argument_parser, search


def main() -> None:
    search(argument_parser(__doc__ or "").parse_intermixed_args())


if __name__ == "__main__":
    main_exit(main)
