"""How a command ends: 0 success, 2 a bad request (one line, no traceback), 1 a failed run (first cause first)."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class BadRequest(Exception):
    """The request cannot be carried out as written; the message is one clear line that says what to do."""


class RunFailed(Exception):
    """A run started and failed; the message names worker, step and shard, first cause first."""


def check_summary(path: str | None) -> None:
    """Raise BadRequest where `--summary FILE` could not be written: better now than after hours of training."""
    if not path:
        return
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = not target.exists()
        target.open("a").close()
        if new:
            target.unlink()  # a run that fails leaves no empty summary
    except OSError as error:
        raise BadRequest(f"--summary {path} cannot be written ({error.strerror}): name a file") from None


def write_summary(path: str | None, summary: dict[str, Any]) -> None:
    """Write the run's ids, paths and figures as one JSON object, where `--summary FILE` was given."""
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(summary, indent=2, default=str) + "\n")


def main_exit(main: Callable[[], Any]) -> None:
    """Run `main` and leave with the project's exit codes."""
    # transformers draws a bar for every file that it reads or writes, in the middle of our own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        main()
    except BadRequest as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
