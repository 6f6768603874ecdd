"""Draw pictures from prompts with a trained model: a PNG each, a labelled grid, and a JSON of what made them.

python pipelines/generate.py "a red seven on a white background" "handwritten 3, ink blue, paper yellow"
python pipelines/generate.py --model models:/ldm-demo@champion --file prompts.txt --seeds 1,2,3 --out pictures
echo "a green four on black paper" | python pipelines/generate.py

With a model of all stages of unCLIP also variations of a picture, paths between two, and along a difference of texts:

python pipelines/generate.py --model models:/unclip-demo --image digit.png --count 8
python pipelines/generate.py --model models:/unclip-demo --image one.png --to other.png --count 8
python pipelines/generate.py --model models:/unclip-demo --image one.png --from-text "a red 7" --to-text "a blue 7"
python pipelines/generate.py --model models:/unclip-demo --by text_embedding "a red seven on a white background"
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
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; without any, and without --file, lines of stdin")
    add("--file", metavar="FILE", help="one prompt a line; empty lines are skipped")
    add("--negative", metavar="PROMPT", help="what to steer away from, for all pictures (default: nothing)")
    add("--seed", type=int, default=0, help="the i-th picture is drawn from seed + i (default: %(default)s)")
    add("--seeds", metavar="1,2,3", help="draw each prompt once from each of these seeds, in place of --seed")
    add(
        "--count",
        type=int,
        help="pictures where there are no prompts: of an unconditional model (default: 16), or of "
        "unCLIP told an --image (default: 8)",
    )
    add(
        "--model",
        default="models:/ldm-demo",
        help="a run's folder or name, an export's folder, models:/NAME/VERSION or models:/NAME@ALIAS; models:/NAME is "
        "the highest version (default: %(default)s)",
    )
    add("--tracking-uri", help="MLflow server for models:/… (default: MLFLOW_TRACKING_URI, else the local one)")
    add(
        "--image", metavar="FILE", help="what a model that is told an image is told, for all pictures; unCLIP varies it"
    )
    add("--mask", metavar="FILE", help="white where an inpainting model fills in; all else stays as in --image")
    add(
        "--by",
        metavar="NAME",
        help="of unCLIP: draw by this of its priors, or by text_embedding or text_only (ablations)",
    )
    add("--to", metavar="FILE", help="of unCLIP: --count pictures on the way from --image to this one")
    add(
        "--from-text",
        metavar="TEXT",
        help="of unCLIP: --count pictures from --image on, as --to-text differs from this",
    )
    add("--to-text", metavar="TEXT", help="see --from-text")
    add(
        "--watermark",
        metavar="KEY",
        help="mark pictures invisibly; names an environment variable or a file with the key, which "
        "detect_watermark.py needs too (default: no mark)",
    )
    add_drawing_arguments(parser)
    add("--device", help="cpu, cuda, … (default: a GPU where there is one)")
    add("--out", metavar="FOLDER", default="out/generated", help="where the files go (default: %(default)s)")
    add("--summary", metavar="FILE", help="write paths and settings as one JSON object")
    arguments = parser.parse_args()

    from pipelines.generation import generate  # imported late, so that --help is quick

    generate(arguments)


if __name__ == "__main__":
    main_exit(main)
