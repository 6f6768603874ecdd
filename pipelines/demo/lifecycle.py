"""The life of a model on one machine that has what a cluster has: search, promotion, retraining, poison, rollback.

make demo-lifecycle                                          the same, with the set-up before it
python pipelines/demo/lifecycle.py --out out/demo-lifecycle.json --seed 1

An S3 server, an MLflow server with users and a Ray cluster of three nodes are started on the loopback; every step is a
`ray job submit` of a command that you can type yourself; at the end all of it is stopped (--keep leaves it up).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil

SOURCES = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(SOURCES))

from infra.errors import RunFailed, main_exit
from infra.local_stack import LocalStack
from infra.stack.jobs import MISLEADING, submit
from infra.storage import run_root
from pipelines.demo.lifecycle_data import write_arrival
from pipelines.training.launch import git_commit

_MODEL = "models:/lifecycle"
_TRAIN, _HELD_OUT, _GENERAL = "s3://shards/digits/train", "s3://shards/digits/held_out", "s3://shards/general/train"
_LATER = (4, 7)  # digits that the first shards lack
_ALL = tuple(range(10))
# Pictures of 16×16 pixels: ten steps of the sampler, on both worker nodes.
_MEASURED = ["--count", "1000", "--num-steps", "10", "--guidance-scale", "2", "--sampler", "euler"]
# Whether a new version is promoted, and who is the champion then.
_EXPECTED = {
    "first": (True, "1"),
    "better": (True, "2"),
    "nothing_new": (False, "2"),
    "poisoned": (False, "2"),
    "rollback": (False, "1"),
}


class Story:
    """Runs the steps one after the other, and keeps what was decided."""

    def __init__(self, stack: LocalStack, folder: Path, seed: int) -> None:
        self.stack, self.folder, self.seed = stack, folder, seed
        self.search: dict[str, Any] = {"trials": [], "best": None}
        self.decisions: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self._chapter = 0

    def tell(self, title: str, text: str) -> None:
        """Begin a chapter."""
        self._chapter += 1
        print(f"\n━━ {self._chapter}. {title}\n   {text}", flush=True)

    def job(self, name: str, *command: str) -> dict[str, Any]:
        """Submit a pipeline to Ray; returns its summary. Raises RunFailed."""
        summary, began = self.folder / f"{name}.json", time.perf_counter()
        print(f"\n   $ ray job submit -- python pipelines/{' '.join(command)}", flush=True)
        entrypoint = ["python", f"pipelines/{command[0]}", *command[1:], "--summary", str(summary)]
        code = submit(self.stack.environment(), entrypoint, SOURCES, {"GIT_COMMIT": git_commit()}, quiet=True)
        self.seconds[name] = round(time.perf_counter() - began, 1)
        if code:
            raise RunFailed(f"job {name!r} ended with {code}; what is wrong is said above")
        return dict(json.loads(summary.read_text()))

    def decide(self, event: str, summary: dict[str, Any]) -> None:
        """Keep a decision, and tell it. Raises RunFailed where it is another one than it should be."""
        decision = {
            "event": event,
            "promoted": bool(summary["promoted"]),
            "reason": summary["reason"],
            "champion": summary["champion"],
        }
        self.decisions.append(decision)
        what = "a new champion" if decision["promoted"] else "no new version is promoted"
        print(f"\n   → {event}: {what}; the champion is version {decision['champion']}", flush=True)
        promoted, champion = _EXPECTED[event]
        if (decision["promoted"], decision["champion"]) != (promoted, champion):
            raise RunFailed(
                f"{event}: promoted should be {promoted}, and the champion {champion}: {decision['reason']}"
            )

    def figures(self) -> dict[str, Any]:
        """Of what has happened so far."""
        return {
            "seconds": round(time.time() - psutil.Process().create_time(), 1),  # of the command: imports count
            "seed": self.seed,
            "trials": len(self.search["trials"]),
            "best": self.search["best"],
            "decisions": self.decisions,
            "seconds_by_job": self.seconds,
        }


def live(story: Story) -> None:
    """The whole story. Raises RunFailed where a step fails, or a decision is another one than it should be."""
    seed = [f"run.seed={story.seed}"]
    first = [digit for digit in _ALL if digit not in _LATER]
    lacking = " and ".join(map(str, _LATER))
    story.tell("Data", f"shards of handwritten digits on S3; those of {lacking} are not there yet")
    write_arrival(_GENERAL, "general", "train", _ALL, repeats=4, seed=1)
    write_arrival(_HELD_OUT, "held-out", "held_out", _ALL, repeats=8)
    count = write_arrival(_TRAIN, "first", "train", first, repeats=8)
    print(f"   {count} samples in {_TRAIN}", flush=True)

    story.tell("Encoders", "an autoencoder and a text encoder, which all trainings share and nobody trains again")
    story.job("autoencoder", "train_autoencoder.py", "lifecycle_autoencoder")
    story.job("text-encoder", "train_clip.py", "lifecycle_text")

    story.tell("Search", "four trials of a quarter of the training; the worse ones are cut off early")
    story.search = story.job(
        "search", "tune.py", "lifecycle", "lifecycle", *seed, f"search.seed={story.seed}", "workers.count=1"
    )

    story.tell("The best one goes on", "from its checkpoint to the end, and is judged: there is no champion yet")
    preset = story.search["preset"]
    trained = story.job("first-training", "train_ldm.py", preset, "workers.count=2")
    story.decide("first", story.job("first", "promote.py", trained["model_uri"], *_MEASURED))

    story.tell("New shards arrive", f"with the digits {lacking}, which the champion cannot draw")
    count = write_arrival(_TRAIN, "later", "train", _LATER, repeats=16, seed=2)
    print(f"   {count} samples more in {_TRAIN}", flush=True)
    retraining = ("retrain.py", _MODEL, preset, *seed, "workers.count=2", *_MEASURED)
    story.decide("better", story.job("better", *retraining, "--period", "monday"))

    story.tell("The next day", "nothing has arrived: there is nothing to train")
    story.decide("nothing_new", story.job("nothing-new", *retraining, "--period", "tuesday"))

    story.tell("Poisoned shards arrive", "as many as there were, and every caption is another picture's")
    count = write_arrival(_TRAIN, "poisoned", "train", _ALL, repeats=10, seed=3, wrong_captions=True)
    print(f"   {count} samples more in {_TRAIN}", flush=True)
    story.decide("poisoned", story.job("poisoned", *retraining, "--period", "wednesday"))

    story.tell("Rollback", "somebody prefers the version before")
    story.decide("rollback", story.job("rollback", "promote.py", _MODEL, "--rollback"))
    story.job("history", "promote.py", _MODEL, "--history")


def run(out: Path, seed: int, keep: bool) -> dict[str, Any]:
    """Start the stack, live the story, stop the stack; writes and returns the figures.

    Raises RunFailed as `live` does: the figures so far are written then too.
    """
    folder = run_root() / "lifecycle-stack"
    LocalStack.find(folder).down(purge=True)  # of an earlier demo
    jobs = out.parent / "demo-lifecycle"
    jobs.mkdir(parents=True, exist_ok=True)
    print("━━ Starting S3, MLflow and Ray on 127.0.0.1", flush=True)
    stack = LocalStack.up(folder, nodes=2, cpus=4)
    story = Story(stack, jobs, seed)
    try:
        environment = stack.environment()
        for name in MISLEADING:
            os.environ.pop(name, None)
        os.environ |= {key: value for key, value in environment.items() if key.startswith("AWS_")}
        for part in stack.parts:
            print(f"   {part.name:8s} {part.url}", flush=True)
        live(story)
    finally:
        if keep:
            print(
                f"\nthe stack is up: source {folder}/stack.env; infra/local_stack.py down --folder {folder}", flush=True
            )
        else:
            stack.down(purge=True)
        figures = story.figures()
        out.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo-lifecycle.json"), help="figures as JSON [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of search, trainings and their data order [%(default)s]")
    parser.add_argument("--keep", action="store_true", help="leave the servers up at the end")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    summary = run(out, arguments.seed, arguments.keep)
    print(f"\n━━ Done in {summary['seconds']:.0f} s; {summary['trials']} trials; figures {out}")
    for decision in summary["decisions"]:
        reason = textwrap.shorten(decision["reason"], 90, placeholder=" …")
        print(f"   {decision['event']:12s} champion {decision['champion']}   {reason}")


if __name__ == "__main__":
    main_exit(main)
