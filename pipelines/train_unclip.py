"""Train all stages of unCLIP, one after the other, and join them to one model that draws from a sentence.

python pipelines/train_unclip.py                                         the demo preset
python pipelines/train_unclip.py my.yaml decoder.run.steps=20000 register_as=mine
ray job submit --working-dir . -- python pipelines/train_unclip.py       the same, as a Ray job

CLIP, then shards with its embeddings, priors, decoder, upsamplers. Each stage is a run of its own, of the preset that
is named for it, and resumes by itself: the same command goes on where it was interrupted. In MLflow they are children
of one run. Each can be trained alone too: train_clip.py, train_prior.py, train_decoder.py, train_upsampler.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import check_summary, main_exit, write_summary


def main() -> None:
    from pipelines.training.explain import describe_keys
    from pipelines.unclip.config import UnclipConfig, load_stages

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys, with defaults (those of a stage as of its own pipeline, after STAGE.):\n"
        + "\n".join(describe_keys(UnclipConfig)),
    )
    add = parser.add_argument
    add("preset", nargs="?", default="unclip_demo", help="YAML file, or a preset's name [unclip_demo]")
    add("overrides", nargs="*", metavar="key=value", help="of the preset, or STAGE.dotted.key=value of a stage's")
    add("--dry-run", action="store_true", help="print every resolved stage and its memory, and stop")
    add("--summary", metavar="FILE", help="write ids, paths and figures of all stages as one JSON object")
    arguments = parser.parse_args()
    if "=" in arguments.preset:  # overrides alone change the default preset
        arguments.overrides.insert(0, arguments.preset)
        arguments.preset = "unclip_demo"
    stages = load_stages(arguments.preset, arguments.overrides)
    check_summary(arguments.summary)
    if arguments.dry_run:
        from pipelines.training.dry_run import describe

        write_summary(arguments.summary, {name: describe(config) for name, config in stages.trainings.items()})
        return
    from pipelines.unclip.run import train_stages

    summary = train_stages(stages)
    write_summary(arguments.summary, summary)
    print(f"{summary['name']}: {', '.join(f'{name} {done}' for name, done in summary['outcomes'].items())}")
    print(f"  export    {summary['export']}\n  mlflow    {summary['tracking_uri']}  run {summary['mlflow_run_id']}")
    if summary["model_uri"]:
        print(f"  model     {summary['model_uri']}")


if __name__ == "__main__":
    main_exit(main)
