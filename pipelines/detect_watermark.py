"""Look for the invisible mark of a key in pictures, each and all together.

    python pipelines/detect_watermark.py out/generated/0*.png --key watermark.key
    python pipelines/detect_watermark.py shrunk.jpg --size 256 --key WATERMARK_KEY

The mark is what `generate.py --watermark` and `generate_shards.py --watermark` put in; pipelines/watermark.py says what
it survives. Together the pictures are surer than each alone, where all have the mark. Whether it is found or not, the
exit code is 0; --summary has the answer for programs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import BadRequest, check_summary, main_exit, write_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="pictures, whole or cropped, in the size in which they were drawn")
    add("--key", required=True, metavar="KEY", help="environment variable or file that holds the key")
    add("--size", type=int, help="bring pictures to this height and width first: that in which they were drawn")
    add("--false-alarms", type=float, default=1e-3, help="share among pictures without the mark (default: %(default)s)")
    add("--summary", metavar="FILE", help="write scores as one JSON object")
    arguments = parser.parse_args()

    from pipelines.watermark import read_key, threshold, traces_of_file, z_scores  # late, so that --help is quick

    check_summary(arguments.summary)
    if not 0 < arguments.false_alarms < 0.5:
        raise BadRequest(f"--false-alarms must be above 0 and below 0.5, not {arguments.false_alarms:g}")
    key, limit, pictures = read_key(arguments.key), threshold(arguments.false_alarms), []
    total: Any = 0.0
    for file in arguments.files:
        found = traces_of_file(file, arguments.size)
        z = float(z_scores(found, key)[0])
        pictures.append({"file": file, "z": round(z, 2), "found": z >= limit})
        print(f"{'found' if z >= limit else '-':5}  z {z:5.2f}  {file}")
        total = total + found
    z = float(z_scores(total, key)[0])
    print(f"{'found' if z >= limit else '-':5}  z {z:5.2f}  all together (found from {limit:.2f} on)")
    write_summary(arguments.summary, {"pictures": pictures, "z": round(z, 2), "found": z >= limit, "limit": limit})


if __name__ == "__main__":
    main_exit(main)
