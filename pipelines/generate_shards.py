"""Draw a file of prompts, a million say, over the cluster: pictures come out as shards.

    python pipelines/generate_shards.py prompts.txt s3://bucket/drawn --model models:/ldm-demo@champion
    python pipelines/generate_shards.py prompts.jsonl drawn --model models:/gan-demo --actors 2

A prompt a line; of a .jsonl file an object a line, with `prompt` and, where wanted, `seed`. Sample NNNNNNNNN of the
shards has the picture of prompt N (from 0) as png, which says what made it, the prompt as txt, and both with the seed
as json. A picture depends on its prompt and seed alone. After an interruption the same command goes on with the shards
that are missing: none is lost, and none comes twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit
from pipelines.drawing_options import add_drawing_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", help="text or .jsonl file, local or s3://; empty lines are skipped")
    add("out", metavar="OUT", help="folder or s3:// URL for the shards")
    add("--model", default="models:/ldm-demo", help="as of generate.py; the version is settled once (%(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        help="line i is drawn from seed + i, unless it has its own (default: %(default)s)",
    )
    add("--negative", metavar="PROMPT", help="what to steer away from, for all pictures (default: nothing)")
    add("--shard-samples", type=int, default=1000, help="pictures of a shard (default: %(default)s)")
    add(
        "--watermark",
        metavar="KEY",
        help="mark pictures invisibly; names an environment variable or a file with the key, which "
        "detect_watermark.py needs too (default: no mark)",
    )
    add_drawing_arguments(parser, precision="auto")
    add("--actors", type=int, help="that draw side by side (default: one a GPU, or one a core)")
    add("--gpus", action="store_true", help="one GPU for each actor")
    add("--tracking-uri", help="MLflow server for models:/… (default: MLFLOW_TRACKING_URI, else the local one)")
    add("--overwrite", action="store_true", help="begin anew where OUT holds other shards")
    add("--summary", metavar="FILE", help="write counts, digests and pictures a second as one JSON object")
    arguments = parser.parse_args()

    from pipelines.batch_generation import generate_shards  # imported late, so that --help is quick

    generate_shards(arguments)


if __name__ == "__main__":
    main_exit(main)
