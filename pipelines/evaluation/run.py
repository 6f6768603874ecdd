"""One evaluation from beginning to end: find, draw, measure, compute, write, log."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genmodels.metrics.figure import Conditions
from infra.errors import BadRequest
from infra.mlflow_store import check_tracking
from infra.storage import run_root
from pipelines.drawing_options import complete_options
from pipelines.evaluation.curves import measure_curves
from pipelines.evaluation.figures import Measured, Reader, Sets, measure_figures
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


class _Set(NamedTuple):
    """Pictures that are measured: where their features go, what is noted there, the title of their bar, and whether
    features that are there already will do."""

    source: Source
    folder: Path
    facts: dict[str, Any]
    title: str
    keep: bool


@dataclass(frozen=True)
class _Plan:
    """One evaluation, before any picture is drawn."""

    request: Request
    subject: Subject
    out: Path
    extractors: Extractors
    reader: Reader | None
    references: dict[str, Reference]
    generated: Source
    curves: dict[str, dict[str, Drawn]]

    @staticmethod
    def of(request: Request, subject: Subject, extractors: Extractors, reader: Reader | None) -> _Plan:
        """Raises BadRequest where something cannot be used."""
        request = replace(request, options=complete_options(request.options, subject.folder))
        if request.perceptual is not None and subject.kind != "autoencoder":
            raise BadRequest(
                f"--lpips compares an autoencoder's reconstructions, and {request.model} is no autoencoder"
            )
        if request.perceptual is not None and not Path(request.perceptual).expanduser().is_file():
            raise BadRequest(f"--lpips {request.perceptual}: there is no such file")
        references = references_of(request, subject, extractors)
        generated = generated_of(request, subject, references["held_out"])
        check_counts(generated, references)
        if reader is not None and not readable(generated, references["held_out"]):
            reader = None
        curves = curve_sources(request, generated) if isinstance(generated, Drawn) else {}
        out = request.out or run_root() / "evaluation" / _folder_name(subject)
        return _Plan(request, subject, out, extractors, reader, references, generated, curves)

    def sets(self) -> dict[str, _Set]:
        """All pictures that are looked at, by name: generated, held_out, training where known, and those of curves."""
        pictures = self.out / "pictures"
        found = {"generated": _Set(self.generated, pictures / "generated", {}, "pictures", keep=False)}
        for curve in self.curves.values():
            found |= {name: _Set(drawn, pictures / name, {}, "curves", keep=False) for name, drawn in curve.items()}
        titles = {"held_out": "real pictures", "training": "training pictures"}
        for name, reference in self.references.items():
            found[name] = _Set(reference.shards, reference.folder, reference.facts(), titles[name], keep=True)
        return found


def evaluate(request: Request) -> dict[str, Any]:
    """Carry it out; returns figures, findings and paths.

    Raises:
        BadRequest: something cannot be used; the message says what to do.
    """
    return evaluate_together([request])[0]


def evaluate_together(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Carry out requests that differ in the model alone, with actors that are started once. Raises as `evaluate`."""
    clock, first = _Clock(), requests[0]
    subjects = [find_subject(request.model, request.tracking_uri) for request in requests]
    looks = extractors_of(first, subjects[0])
    plans = [_Plan.of(request, subject, *looks) for request, subject in zip(requests, subjects, strict=True)]
    clock.lap("checks")
    actors, use_gpu = _connect(first)
    for plan in plans:
        _check_nodes(plan.request, plan.subject, plan.references)
    clock.lap("ray")
    stores = _measure(plans, looks[0], actors, use_gpu)
    clock.lap("pictures and features")
    return [_conclude(plan, stores, clock) for plan in plans]


def _measure(plans: Sequence[_Plan], extractors: Extractors, actors: int, use_gpu: bool) -> dict[Path, FeatureStore]:
    """The features of all pictures, by their folder; those that several plans look at are measured once."""
    stores: dict[Path, FeatureStore] = {}
    missing: dict[str, _Set] = {}
    for plan in plans:
        for name, each in plan.sets().items():
            if each.folder in stores or each.folder in (other.folder for other in missing.values()):
                continue
            if each.keep and (store := FeatureStore.open(each.folder)) is not None:
                stores[each.folder] = store
            elif name not in missing:
                missing[name] = each
            else:
                of = f" of {plan.request.model}"
                missing[name + of] = each._replace(title=each.title + of)
    sources = {name: each.source for name, each in missing.items()}
    folders = {name: each.folder for name, each in missing.items()}
    facts = {name: each.facts for name, each in missing.items()}
    with _bars(missing) as done:
        measured = measure(sources, folders, facts, extractors, actors, use_gpu, done)
    return stores | {folders[name]: store for name, store in measured.items()}


@contextmanager
def _bars(sets: Mapping[str, _Set]) -> Iterator[Callable[[str, int], None]]:
    """A bar for each title; gives what is told a set and how many pictures more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    totals: dict[str, int] = {}
    for each in sets.values():
        totals[each.title] = totals.get(each.title, 0) + each.source.count
    with Progress(*columns, console=Console(stderr=True)) as bar:
        rows = {title: bar.add_task(title, total=total) for title, total in totals.items()}
        yield lambda name, pictures: bar.advance(rows[sets[name].title], pictures)


def _conclude(plan: _Plan, measured_sets: Mapping[Path, FeatureStore], clock: _Clock) -> dict[str, Any]:
    """From features to figures, and to all that is written of them."""
    request, subject, extractors, out = plan.request, plan.subject, plan.extractors, plan.out
    stores = {name: measured_sets[each.folder] for name, each in plan.sets().items()}
    sets = Sets(stores["generated"], stores["held_out"], stores.get("training"))
    conditions = _conditions(request, plan.generated, extractors, plan.references, sets)
    texts = None
    if extractors.clip is not None and all(sets.generated.captions):
        texts = extractors.clip.texts(sets.generated.captions)
    measured = measure_figures(sets, conditions, plan.reader, texts)
    found = findings(measured)
    slices = {BY_WORD: by_word(sets, measured), BY_CLASS: by_class(sets, measured)}
    drawn_curves = measure_curves(request, plan.curves, stores, sets, plan.reader, extractors)
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
    summary["seconds_by_part"] = dict(clock.seconds)
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
