"""The command line that all demos share: --out, --count, and overrides."""

from __future__ import annotations

import argparse
from pathlib import Path

from infra.errors import BadRequest
from pipelines.demo.evaluation import kept_out_prompts


def parse(
    description: str | None, name: str, count: int, overrides: str, metavar: str = "dotted.key=value"
) -> argparse.Namespace:
    """Read the command line of the demo of this name: `out` (absolute, its folder made), `count`, `overrides`.

    Args:
        description: the module's docstring.
        name: figures go to out/NAME.json.
        count: pictures that are judged, where none is given.
        overrides: which trainings the overrides are for.

    Raises:
        BadRequest: so many pictures do not cover the prompts evenly.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"out/{name}.json"), help="figures as JSON [%(default)s]")
    parser.add_argument("--count", type=int, default=count, help="pictures judged, a multiple of 20 [%(default)s]")
    parser.add_argument("overrides", nargs="*", metavar=metavar, help=overrides)
    arguments = parser.parse_args()
    arguments.out = arguments.out.absolute()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        kept_out_prompts(arguments.count)
    except ValueError as error:
        raise BadRequest(f"--count: {error}") from None
    return arguments
