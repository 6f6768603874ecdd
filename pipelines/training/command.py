"""The command line that all training pipelines share: PRESET.yaml dotted.key=value …"""

from __future__ import annotations

import argparse
import textwrap

from rich.console import Console

from genmodels.families import members_of
from infra.errors import BadRequest, check_summary, write_summary
from pipelines.training.config import TrainConfig, load_config
from pipelines.training.dry_run import describe
from pipelines.training.explain import describe_keys

_WIDTH = 118  # of what is printed at the end


def parse(description: str, default_preset: str, *allowed: str) -> tuple[TrainConfig, argparse.Namespace]:
    """Read the command line of a pipeline that trains objectives of one kind, or of several.

    Raises:
        BadRequest: the configuration is wrong, or of another kind.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys, with defaults:\n" + "\n".join(describe_keys(TrainConfig)),
    )
    parser.add_argument(
        "preset", nargs="?", default=default_preset, help=f"YAML file, or a preset's name [{default_preset}]"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="replaces a value of the preset; values are YAML"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and its memory, and stop")
    parser.add_argument("--summary", metavar="FILE", help="write ids, paths and figures of the run as one JSON object")
    arguments = parser.parse_args()
    if "=" in arguments.preset:  # overrides alone change the default preset
        arguments.overrides.insert(0, arguments.preset)
        arguments.preset = default_preset
    config = load_config(arguments.preset, arguments.overrides)
    kinds = {member.kind for member in members_of(config.objective).values()}
    if not kinds <= set(allowed):
        raise BadRequest(
            f"{arguments.preset} trains objective.kind={', '.join(sorted(kinds))}, this pipeline {' or '.join(allowed)}"
        )
    check_summary(arguments.summary)
    return config, arguments


def run(description: str, default_preset: str, *kinds: str) -> None:
    """Parse, then dry-run or train, and say where everything is."""
    config, arguments = parse(description, default_preset, *kinds)
    if arguments.dry_run:
        facts = describe(config)
        write_summary(arguments.summary, facts)
        return
    from pipelines.training.launch import train

    summary = train(config)
    write_summary(arguments.summary, summary)
    console = Console(soft_wrap=True)
    console.print(
        f"[bold]{summary['run']}[/]: {summary['outcome']}, {summary['steps']} steps, {summary['epochs']:.2f} epochs",
        highlight=False,
    )
    figures = "  ".join(f"{name}={value:.5g}" for name, value in summary["figures"].items())
    aligned = textwrap.fill(figures, _WIDTH, initial_indent="  figures   ", subsequent_indent=" " * 12)
    console.print(aligned, highlight=False, markup=False)
    console.print(f"  run       {summary['run_folder']}", highlight=False, markup=False)
    console.print(f"  export    {summary['export']}", highlight=False, markup=False)
    console.print(
        f"  mlflow    {summary['tracking_uri']}  run {summary['mlflow_run_id']}", highlight=False, markup=False
    )
    if summary["model_uri"]:
        console.print(f"  model     {summary['model_uri']}", highlight=False, markup=False)
