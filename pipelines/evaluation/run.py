"""One evaluation from beginning to end: find, draw, measure, compute, write, log."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genmodels.metrics.figure import Conditions
from infra.errors import BadRequest
from infra.mlflow_store import check_tracking
from infra.storage import run_root
from pipelines.drawing_options import complete_options
from pipelines.evaluation.curves import measure_curves
from pipelines.evaluation.figures import Measured, Sets, measure_figures
from pipelines.evaluation.findings import findings
from pipelines.evaluation.measure import Extractors, measure
from pipelines.evaluation.plan import (
    Request,
    check_counts,
    curve_sources,
    extractors_of,
    generated_of,
    readable,
    references_of,
)
from pipelines.evaluation.references import Reference
from pipelines.evaluation.report import write_report
from pipelines.evaluation.slices import BY_CLASS, BY_WORD, by_class, by_word
from pipelines.evaluation.sources import Drawn, Source
from pipelines.evaluation.store import FeatureStore
from pipelines.evaluation.subject import Subject, find_subject
from pipelines.training import cluster


class _Clock:
    """Where the time goes, by part."""

    def __init__(self) -> None:
        self.began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = round(now - self._last, 1)
        self._last = now


def evaluate(request: Request) -> dict[str, Any]:
    """Carry it out; returns figures, findings and paths.

    Raises:
        BadRequest: something cannot be used; the message says what to do.
    """
    clock = _Clock()
    subject = find_subject(request.model, request.tracking_uri)
    request = replace(request, options=complete_options(request.options, subject.folder))
    if request.perceptual is not None and subject.kind != "autoencoder":
        raise BadRequest(f"--lpips compares an autoencoder's reconstructions, and {request.model} is no autoencoder")
    if request.perceptual is not None and not Path(request.perceptual).expanduser().is_file():
        raise BadRequest(f"--lpips {request.perceptual}: there is no such file")
    extractors, reader = extractors_of(request, subject)
    references = references_of(request, subject, extractors)
    out = request.out or run_root() / "evaluation" / _folder_name(subject)
    generated = generated_of(request, subject, references["held_out"])
    check_counts(generated, references)
    if reader is not None and not readable(generated, references["held_out"]):
        reader = None
    sources: dict[str, Source] = {"generated": generated}
    curves = curve_sources(request, generated) if isinstance(generated, Drawn) else {}
    sources |= {name: source for found in curves.values() for name, source in found.items()}
    folders = {name: out / "pictures" / name for name in sources}
    facts: dict[str, dict[str, Any]] = {name: {} for name in sources}
    stores: dict[str, FeatureStore] = {}
    for name, reference in references.items():
        if (store := FeatureStore.open(reference.folder)) is not None:
            stores[name] = store
        else:
            sources[name], folders[name], facts[name] = reference.shards, reference.folder, reference.facts()
    clock.lap("checks")
    actors, use_gpu = _connect(request)
    _check_nodes(request, subject, references)
    clock.lap("ray")
    with _Bars(sources) as (bar, rows):

        def done(name: str, pictures: int) -> None:
            bar.advance(rows[name], pictures)

        stores |= measure(sources, folders, facts, extractors, actors, use_gpu, done)
    clock.lap("pictures and features")

    sets = Sets(stores["generated"], stores["held_out"], stores.get("training"))
    conditions = _conditions(request, sources["generated"], extractors, references, sets)
    texts = None
    if extractors.clip is not None and all(sets.generated.captions):
        texts = extractors.clip.texts(sets.generated.captions)
    measured = measure_figures(sets, conditions, reader, texts)
    found = findings(measured)
    slices = {BY_WORD: by_word(sets, measured), BY_CLASS: by_class(sets, measured)}
    drawn_curves = measure_curves(request, curves, stores, sets, reader, extractors)
    clock.lap("figures")
    facts_told = {"model": request.model, "digest of the model": subject.digest, "pictures": str(out / "pictures")}
    report = out / "report.html"
    write_report(report, request.model, sets, measured, found, slices, drawn_curves, facts_told)
    summary: dict[str, Any] = {
        "model": request.model,
        "digest": subject.digest,
        "figures": [figure.model_dump() for figure in measured.figures],
        "real": measured.real,
        "findings": [each._asdict() for each in found],
        "slices": {title: [each._asdict() for each in parts] for title, parts in slices.items()},
        "curves": [asdict(curve) | {"points": [p._asdict() for p in curve.points]} for curve in drawn_curves],
        "report": str(report),
        "figures_file": str(out / "figures.json"),
    }
    clock.lap("report")
    summary["seconds_by_part"] = clock.seconds
    summary["seconds"] = round(time.perf_counter() - clock.began, 1)
    Path(summary["figures_file"]).write_text(json.dumps(summary, indent=2) + "\n")
    if request.log:
        try:
            _log(subject, measured, out)
        except Exception as error:  # whatever MLflow and what is between raise: the work is done, and is not lost
            raise BadRequest(f"figures and report are in {out}, but MLflow did not take them: {error}") from error
    return summary


def _connect(request: Request) -> tuple[int, bool]:
    """Ray, the number of actors, and whether each has a GPU."""
    cores = psutil.cpu_count(logical=False) or 1
    cluster.join((request.actors or cores) + 1)
    import ray

    room, present = cluster.resources(), int(ray.cluster_resources().get("GPU", 0))
    kind = "GPU" if room["GPU"] >= 1 else "CPU"
    # A cluster that scales is not grown to its limit for a few pictures.
    actors = request.actors or present or min(cores, max(1, int(room[kind])))
    if actors > room[kind]:
        raise BadRequest(f"--actors {actors}: Ray has room for {int(room[kind])}{cluster.GROWS}")
    return actors, kind == "GPU"


class _Bars:
    """A bar for what is drawn and one for each set of real pictures."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._sources = sources

    def __enter__(self) -> tuple[Progress, dict[str, Any]]:
        self._bar.__enter__()
        rows, titles = {}, {"generated": "pictures", "held_out": "real pictures", "training": "training pictures"}
        curve = None
        for name, source in self._sources.items():
            if name in titles:
                rows[name] = self._bar.add_task(titles[name], total=source.count)
                continue
            if curve is None:
                others = [each.count for key, each in self._sources.items() if key not in titles]
                curve = self._bar.add_task("curves", total=sum(others))
            rows[name] = curve
        return self._bar, rows

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def _conditions(
    request: Request, generated: Source, extractors: Extractors, references: Mapping[str, Reference], sets: Sets
) -> Conditions:
    drawn: dict[str, Any] = {}
    if isinstance(generated, Drawn):
        options = dict(generated.options)
        drawn = {"seed": request.seed, "precision": sets.generated.facts().get("precision")}
        drawn |= {name: options.pop(name, None) for name in ("sampler", "num_steps", "guidance_scale")}
        options.pop("batch_size", None)  # it changes no picture
        drawn["options"] = {name: json.dumps(v) if isinstance(v, (tuple, list)) else v for name, v in options.items()}
    if request.perceptual is not None:
        with Path(request.perceptual).expanduser().open("rb") as file:
            drawn["options"] = {"lpips": hashlib.file_digest(file, "sha256").hexdigest()[:16]}
    training = references.get("training")
    return Conditions(
        count=sets.generated.count,
        extractor=extractors.features.digest,
        clip=None if extractors.clip is None else extractors.clip.digest,
        data=references["held_out"].digest,
        data_count=sets.held_out.count,
        training_data=None if training is None else training.digest,
        training_count=None if sets.training is None else sets.training.count,
        **drawn,
    )


def _check_nodes(request: Request, subject: Subject, references: Mapping[str, Reference]) -> None:
    """Raises BadRequest where several nodes would have to share what only one of them has."""
    if subject.reference is None or not subject.reference.startswith("models:"):
        cluster.check_shared(subject.reference or str(subject.folder), request.model)
    for name, reference in references.items():
        cluster.check_shared(reference.shards.index.url, f"{name.replace('_', '-')} data")
    if subject.tracking_uri is not None:
        check_tracking(subject.tracking_uri, cluster.node_count())


def _folder_name(subject: Subject) -> str:
    """A name for the results: of the subject, and of its content."""
    name = re.sub(r"[^\w.-]+", "-", subject.name.removeprefix("models:/")).strip("-")[-60:]
    return name if subject.digest is None else f"{name}-{subject.digest[:8]}"


def _log(subject: Subject, measured: Measured, out: Path) -> None:
    """Figures on the MLflow run that trained the subject, and on its version in the registry; the page on the run."""
    from infra.tracking import log_evaluation

    if subject.run_id is not None:
        figures = {f"evaluation_{figure.name}": figure.value for figure in measured.figures}
        log_evaluation(
            subject.tracking_uri, subject.run_id, figures, subject.step, [out / "report.html", out / "figures.json"]
        )
    if subject.version is not None:
        from infra.registry import tag_version

        tags = {f"evaluation.{figure.name}": figure.told() for figure in measured.figures}
        tags["evaluation.conditions"] = measured.figures[0].conditions.model_dump_json(exclude_none=True)
        tag_version(subject.tracking_uri, *subject.version, tags)
