"""The picture of a search: held-out figures of all trials over steps, the best one on top."""

from __future__ import annotations

import io

from pipelines.search.config import SearchConfig
from pipelines.search.record import Trial

_BEST, _OTHERS = "#c0392b", "#8aa0b5"


def draw_search(search: SearchConfig, trials: list[Trial]) -> bytes:
    """A PNG file. `trials`: the best one first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for rank, trial in reversed(list(enumerate(trials))):
        points = [(each["step"], each["figures"].get(search.metric)) for each in trial.reports]
        points = [(step, value) for step, value in points if value is not None]
        if not points:
            continue
        told = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in trial.values.items())
        axes.plot(
            *zip(*points),
            color=_BEST if rank == 0 else _OTHERS,
            linewidth=2.4 if rank == 0 else 1.2,
            marker="o",
            markersize=4,
            zorder=3 if rank == 0 else 2,
            label=f"{trial.number}: {told}" + ("" if trial.complete else " (cut off)"),
        )
    axes.set_xlabel("step")
    axes.set_ylabel(f"{search.metric} ({search.better} is better)")
    axes.set_title(f"{search.name}: {search.method}, {len(trials)} trials", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1][:10], labels[::-1][:10], fontsize=8, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
