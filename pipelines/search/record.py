"""What is known of a search, in its folder: JSON alone, so that a search that was killed goes on from it.

RUN_ROOT/SEARCH/search.json       the preset's tree and the search, as of the first launch
                trials/0003.json  of each trial: its values, the runs that it consisted of, its figures so far
                result.json       all trials, the best one first, once the search is finished
                best.yaml         the best trial as a preset, which goes on from its checkpoint
                search.png        held-out figures of all trials
RUN_ROOT/SEARCH-0003/             a trial's run; SEARCH-0003-1/ where it went on from another one's weights
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from infra import storage
from pipelines.training.run_folder import RunFolder


@dataclass(frozen=True)
class Trial:
    """A trial as it stands.

    Attributes:
        number: from 0 on, in the order of drawing.
        values: of the keys that are searched.
        run: name of its run, and `earlier` names of those before it went on from another trial.
        continue_from: checkpoint of another trial that the run began with.
        reports: step, figures and checkpoint of each interval, of all its runs.
        failed: why it cannot be trained; None where it can.
        complete: whether it has trained for search.steps.
    """

    number: int
    values: dict[str, Any]
    run: str
    earlier: list[str] = field(default_factory=list)
    continue_from: str | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None
    complete: bool = False

    @staticmethod
    def new(search: str, number: int, values: dict[str, Any]) -> Trial:
        return Trial(number, values, f"{search}-{number:04d}")

    def forked(self, values: dict[str, Any], checkpoint: str) -> Trial:
        """The trial, going on from another one's checkpoint with other values."""
        earlier = [*self.earlier, self.run]
        run = f"{earlier[0]}-{len(earlier)}"
        return replace(
            self, values=values, run=run, earlier=earlier, continue_from=checkpoint, failed=None, complete=False
        )

    def reported(self, entry: dict[str, Any]) -> Trial:
        """With the figures of a step; those of the same run at this step and after it are replaced."""
        entry = {**entry, "run": self.run}
        kept = [each for each in self.reports if each["run"] != self.run or each["step"] < entry["step"]]
        return replace(self, reports=[*kept, entry])

    @property
    def step(self) -> int:
        return int(self.reports[-1]["step"]) if self.reports else 0

    def value(self, metric: str) -> float | None:
        """The last value of a metric."""
        return self.reports[-1]["figures"].get(metric) if self.reports else None

    def save(self, folder: RunFolder) -> None:
        folder.write(f"trials/{self.number:04d}.json", asdict(self))


def read_trial(folder: RunFolder, number: int) -> Trial | None:
    """A trial by its number; None where there is none yet."""
    content = folder.read(f"trials/{number:04d}.json")
    return None if content is None else Trial(**content)


def read_trials(folder: RunFolder) -> list[Trial]:
    """All trials that were begun, in the order of their numbers."""
    found: list[Trial] = []
    while (trial := read_trial(folder, len(found))) is not None:
        found.append(trial)
    return found


def ranked(trials: list[Trial], metric: str, better: str) -> list[Trial]:
    """The best first: those that came furthest, by the metric; failed ones and those without a figure last."""
    sign = 1 if better == "lower" else -1

    def order(trial: Trial) -> tuple[bool, int, float]:
        value = trial.value(metric)
        usable = value is not None and trial.failed is None
        return not usable, -trial.step, sign * value if value is not None else 0.0

    return sorted(trials, key=order)


def write_text(folder: RunFolder, name: str, text: str) -> str:
    """A text file of the search's folder; returns its URL."""
    storage.write_bytes(folder.path(name), text.encode())
    return folder.path(name)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are the same as JSON."""
    return bool(json.loads(json.dumps(one, default=str)) == json.loads(json.dumps(other, default=str)))
