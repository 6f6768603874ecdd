"""Export the model of a run: the newest checkpoint or another one, and averaged over as long as you like.

python pipelines/export_model.py ldm-demo                    the newest checkpoint, as the training itself exports it
python pipelines/export_model.py my-run --ema-length 0.13    of a run with ema.lengths=[0.05,0.1]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a Ray job runs from a copy that is not installed

from infra.errors import BadRequest, check_summary, main_exit, write_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="a training run: its folder or s3:// URL, or its name under the run root")
    add("--step", type=int, help="of the checkpoint (default: the newest)")
    add(
        "--ema-length",
        type=float,
        metavar="SIGMA",
        help="average by a power function whose deviation is this share of the training, 0.01 to 0.28 "
        "(default: the exponential average of the checkpoint)",
    )
    add("--summary", metavar="FILE", help="write the export's path and facts as one JSON object")
    arguments = parser.parse_args()
    check_summary(arguments.summary)

    from infra.storage import run_root
    from pipelines.training.checkpoint import list_checkpoints
    from pipelines.training.export import export_run, find_run

    folder = find_run(arguments.run, str(run_root()))
    if folder is None:
        raise BadRequest(f"{arguments.run} is no training run: give its folder, or its name under {run_root()}")
    chosen = None
    if arguments.step is not None:
        chosen = next((c for c in list_checkpoints(folder.checkpoints) if c.step == arguments.step), None)
        if chosen is None:
            steps = sorted({c.step for c in list_checkpoints(folder.checkpoints)})
            raise BadRequest(f"--step {arguments.step}: {folder.url} has checkpoints of steps {steps}")
    export, facts = export_run(folder, chosen, arguments.ema_length)
    write_summary(arguments.summary, {"export": export, **facts})
    if "ema_profile_error" in facts:
        print(f"the stored averages make this profile up to a relative error of {facts['ema_profile_error']:.4f}")
    print(f"export    {export}")


if __name__ == "__main__":
    main_exit(main)
