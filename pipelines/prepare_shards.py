"""Write webdataset shards with their index, from your own images with captions or from the demo's digits.

python pipelines/prepare_shards.py IMAGES OUT --held-out 0.02     x.jpg beside x.txt
python pipelines/prepare_shards.py IMAGES OUT --table T.csv --image-column file --caption-column text
python pipelines/prepare_shards.py OUT --demo digits --size 32
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import BadRequest, main_exit, write_summary
from pipelines.data.prepare import folder_samples, table_samples, write_digits, write_samples


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="[IMAGES] OUT: OUT is a folder or s3:// URL")
    parser.add_argument("--table", type=Path, help="CSV, JSONL or Parquet that names images (relative to IMAGES)")
    parser.add_argument("--image-column", default="image", help="column of image paths (default: image)")
    parser.add_argument("--caption-column", default="caption", help="column of captions (default: caption)")
    parser.add_argument("--no-captions", action="store_true", help="images only")
    parser.add_argument(
        "--held-out", type=float, default=0.0, metavar="SHARE", help="to OUT/held_out, 0 to 1 (default: 0)"
    )
    parser.add_argument(
        "--demo",
        choices=["digits", "strokes"],
        help="draw the demo's digits instead of reading IMAGES; strokes: in white on black, for the variants of GANs",
    )
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="side of a digit (default: 32)")
    parser.add_argument("--repeats", type=int, default=8, help="drawings of each digit (default: 8)")
    parser.add_argument("--shard-samples", type=int, default=1000, help="samples per shard (default: 1000)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that OUT holds")
    parser.add_argument("--summary", metavar="FILE", help="write what was done as JSON")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if len(args.paths) != (1 if args.demo else 2):
        raise BadRequest("give OUT alone with --demo, else IMAGES and OUT")
    out = args.paths[-1]
    if args.demo == "strokes":
        from pipelines.demo.strokes import write_strokes

        indices = write_strokes(out, args.size, args.shard_samples, args.overwrite)
    elif args.demo:
        indices = write_digits(out, args.size, args.repeats, args.shard_samples, args.overwrite)
    else:
        images, captions = Path(args.paths[0]), not args.no_captions
        column = args.caption_column if captions else None
        samples = (
            table_samples(args.table, images, args.image_column, column)
            if args.table
            else folder_samples(images, captions)
        )
        indices = write_samples(samples, out, args.held_out, args.shard_samples, args.overwrite)
    for split, index in indices.items():
        print(f"{split}: {index.samples} samples in {len(index.names)} shards: {index.url}")
    facts = {split: {"url": i.url, "samples": i.samples, "digest": i.digest} for split, i in indices.items()}
    write_summary(args.summary, facts)


if __name__ == "__main__":
    main_exit(main)
