"""What `tune.py` does once its arguments are read."""

from __future__ import annotations

import argparse
from typing import Any

from infra.errors import check_summary, write_summary
from pipelines.search.config import SearchConfig, load_search
from pipelines.training.explain import describe_keys


def argument_parser(description: str = "") -> argparse.ArgumentParser:
    """The arguments of `tune.py`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of a search, with defaults:\n" + "\n".join(describe_keys(SearchConfig)),
    )
    add = parser.add_argument
    add("preset", help="YAML file or URL, or a preset's name: what is trained")
    add("search", help="YAML file or URL, or a name in pipelines/configs/searches: what varies, and how it is searched")
    add("overrides", nargs="*", metavar="key=value", help="of the preset, or search.key=value; values are YAML")
    add("--summary", metavar="FILE", help="write trials, best preset and ids as one JSON object")
    return parser


def search(arguments: argparse.Namespace) -> dict[str, Any]:
    """Search, as `tune.py` is asked to; prints and returns the summary. Raises BadRequest, RunFailed."""
    check_summary(arguments.summary)
    base, wanted = load_search(arguments.preset, arguments.search, arguments.overrides)
    from pipelines.search.run import search_best, show

    summary = search_best(base, wanted)
    show(summary)
    write_summary(arguments.summary, summary)
    return summary
