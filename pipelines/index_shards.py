"""Index webdataset shards that others made (img2dataset's layout included), over the CPUs of the Ray cluster.

    python pipelines/index_shards.py s3://bucket/laion

A shard is read once, also when this was interrupted. The index is kept beside the shards, or under --index-root.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import main_exit, write_summary
from pipelines.data.index import Location, build_index, scan_here, scan_to_sidecar
from pipelines.data.scan import CHUNK_SAMPLES, ShardFacts

_FEW = 8  # shards; fewer are indexed here sooner than Ray starts


def scan_over_ray(
    location: Location, root: str, names: Sequence[str], chunk_samples: int, rescan: bool = False
) -> Iterator[tuple[str, ShardFacts]]:
    """Scan shards as Ray Data tasks; chunk lists stay in the sidecars, so little comes back."""
    import ray

    def scan(row: dict[str, Any]) -> dict[str, Any]:
        return {"name": row["item"], **scan_to_sidecar(location, root, row["item"], chunk_samples, rescan)._asdict()}

    ray.init(
        ignore_reinit_error=True, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}}
    )
    shards = ray.data.from_items(list(names), override_num_blocks=len(names)).map(scan)
    for row in shards.iter_rows():
        yield row.pop("name"), ShardFacts(**row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="a folder or s3:// URL of *.tar, or a glob of tars")
    parser.add_argument("--index-root", help="where to keep the index if the shards' folder cannot be written")
    parser.add_argument(
        "--chunk-samples", type=int, default=CHUNK_SAMPLES, help=f"samples read at once (default: {CHUNK_SAMPLES})"
    )
    parser.add_argument("--rescan", action="store_true", help="read also the shards whose sidecar looks current")
    parser.add_argument("--summary", metavar="FILE", help="write the index's facts as JSON")
    args = parser.parse_args()
    scan = scan_here if len(Location.parse(args.url).shards()) < _FEW else scan_over_ray
    index = build_index(args.url, partial(scan, rescan=args.rescan), args.index_root, args.chunk_samples)
    print(f"{index.samples} samples in {len(index.names)} shards, digest {index.digest[:12]}, index in {index.root}")
    facts = {"url": index.url, "root": index.root, "samples": index.samples, "digest": index.digest}
    write_summary(args.summary, facts)


if __name__ == "__main__":
    main_exit(main)
