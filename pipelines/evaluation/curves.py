"""Figures against the settings of the sampler: the number of steps, and the guidance scale."""

from __future__ import annotations

from collections.abc import Mapping

from genmodels.metrics.intervals import mean_interval, share_interval
from genmodels.metrics.kernel import kernel_interval
from genmodels.metrics.text import clip_scores
from pipelines.evaluation.charts import Point
from pipelines.evaluation.figures import Reader, Sets
from pipelines.evaluation.measure import Extractors
from pipelines.evaluation.plan import Request
from pipelines.evaluation.report import Curve
from pipelines.evaluation.sources import Drawn
from pipelines.evaluation.store import FeatureStore

_SETTINGS = {"num_steps": "steps", "guidance_scale": "guidance"}


def measure_curves(
    request: Request,
    curves: Mapping[str, Mapping[str, Drawn]],
    stores: Mapping[str, FeatureStore],
    sets: Sets,
    reader: Reader | None,
    extractors: Extractors,
) -> list[Curve]:
    """Kernel distance, and how well captions are followed, against each setting of the sampler."""
    found = []
    for option, sources in curves.items():
        if not sources:
            continue
        few = next(iter(sources.values())).count
        chosen = float(request.options[option])
        settings = {chosen: sets.generated, **{float(d.options[option]): stores[name] for name, d in sources.items()}}
        title = {"num_steps": "number of steps", "guidance_scale": "guidance scale"}[option]
        points = {
            setting: kernel_interval(store.features[:few], sets.held_out.features, few // 5)
            for setting, store in settings.items()
        }
        found.append((f"Kernel distance, by {title} (lower is better)", option, points, chosen, few))
        if reader is not None:
            read = {s: reader(store.thumbnails[:few], store.captions[:few])["all"] for s, store in settings.items()}
            points = {setting: share_interval(int(right.sum()), few) for setting, right in read.items()}
            found.append((f"Captions followed, by {title} (higher is better)", option, points, chosen, few))
        elif extractors.clip is not None and all(sets.generated.captions):
            texts = extractors.clip.texts(sets.generated.captions[:few])
            points = {
                setting: mean_interval(clip_scores(store.embeddings[:few], texts))
                for setting, store in settings.items()
                if store.embeddings is not None
            }
            found.append((f"CLIP score, by {title} (higher is better)", option, points, chosen, few))
    return [
        Curve(
            title, _SETTINGS[option], [Point(s, i.value, i.low, i.high) for s, i in sorted(points.items())], chosen, few
        )
        for title, option, points, chosen, few in found
    ]
