"""Train a registered model again where its data have grown, and promote the result if it passes the gates.

    python pipelines/retrain.py models:/ldm-demo ldm_demo data.url=s3://bucket/train data.validation_url=s3://bucket/held
    python pipelines/retrain.py models:/ldm-demo ldm_demo --period 2026-11 --samples 500000 --from scratch

Nothing new since the champion was trained: it says so and exits with 0. The run is named by model and period, so the
same command in the same period goes on where it was cut off. Schedule it with cron, or with a Kubernetes CronJob.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.promotion.retraining import argument_parser, retrain


def main() -> None:
    retrain(argument_parser(__doc__ or "").parse_intermixed_args())


if __name__ == "__main__":
    main_exit(main)
