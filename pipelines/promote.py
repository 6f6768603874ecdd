"""Make a registered model's version the champion, if it passes the gates; or go back to the champion before.

    python pipelines/promote.py models:/ldm-demo/3
    python pipelines/promote.py models:/ldm-demo/3 --gates gates.yaml improve_by=0.02 --dry-run
    python pipelines/promote.py models:/ldm-demo --history
    python pipelines/promote.py models:/ldm-demo --rollback

The version and the champion draw the same prompts from the same seeds and are measured against the same held-out
pictures. Whoever uses models:/NAME@champion has the new version from the next time that it is opened.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.promotion.command import argument_parser, promote


def main() -> None:
    promote(argument_parser(__doc__ or "").parse_intermixed_args())


if __name__ == "__main__":
    main_exit(main)
