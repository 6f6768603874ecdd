"""One evaluation from beginning to end: find, draw, measure, compute, write, log."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from genmodels.features.config import FeaturesConfig
from genmodels.features.extractor import FeatureExtractor, open_extractor
from genmodels.metrics.figure import Conditions
from genmodels.metrics.intervals import mean_interval, share_interval
from genmodels.metrics.kernel import kernel_interval
from genmodels.metrics.text import clip_scores
from infra.errors import BadRequest
from infra.mlflow_store import check_tracking
from infra.registry import resolve_model
from infra.storage import run_root
from pipelines.evaluation.charts import Point
from pipelines.evaluation.figures import Measured, Reader, Sets, measure_figures
from pipelines.evaluation.findings import findings
from pipelines.evaluation.measure import Extractors, measure
from pipelines.evaluation.references import Reference, data_of, find_reference
from pipelines.evaluation.report import Curve, write_report
from pipelines.evaluation.slices import BY_CLASS, BY_WORD, by_class, by_word
from pipelines.evaluation.sources import Drawn, Files, Reconstructed, Shards, Source
from pipelines.evaluation.store import FeatureStore
from pipelines.evaluation.subject import Subject, find_subject
from pipelines.training import cluster

_FEWEST = 10  # pictures of a set
_SETTINGS = {"num_steps": "steps", "guidance_scale": "guidance"}


@dataclass(frozen=True)
class Request:
    """What is asked for; see the arguments of `evaluate.py`. None takes what the subject's run tells."""

    model: str
    tracking_uri: str | None = None
    count: int = 2000
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    data: str | None = None
    training_data: str | None = None
    caption: str | None = None
    data_count: int = 10_000
    features: str | None = None
    clip: str | None = None
    perceptual: str | None = None
    curve_settings: Mapping[str, list[Any]] = field(default_factory=dict)
    curve_count: int = 0
    actors: int | None = None
    out: Path | None = None
    log: bool = True


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
    if request.perceptual is not None and not Path(request.perceptual).expanduser().is_file():
        raise BadRequest(f"--lpips {request.perceptual}: there is no such file")
    extractors, reader = _extractors(request, subject)
    references = _references(request, subject, extractors)
    out = request.out or run_root() / "evaluation" / _folder_name(subject)
    generated = _generated(request, subject, references["held_out"])
    _check_counts(generated, references)
    if reader is not None and not _readable(generated, references["held_out"]):
        reader = None
    sources: dict[str, Source] = {"generated": generated}
    curves = _curve_sources(request, generated) if isinstance(generated, Drawn) else {}
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
    drawn_curves = _curves(request, curves, stores, sets, reader, extractors)
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


def _extractors(request: Request, subject: Subject) -> tuple[Extractors, Reader | None]:
    """What looks at the pictures, and for the demo's data what reads them. Raises BadRequest."""
    kind = request.features
    if kind is None and subject.config is not None and subject.config.data.demo == "digits":
        kind = "digits"
    if kind is None:
        raise BadRequest(
            "no feature extractor is known for these data: name one, such as --features dinov2:FOLDER_OR_HUB_NAME, "
            "inception:WEIGHTS, clip:FOLDER or classifier:FOLDER"
        )
    try:
        clip = None
        if request.clip is not None:
            folder = request.clip
            if folder.startswith("models:"):
                folder = str(resolve_model(folder, request.tracking_uri))
            clip = open_extractor(TypeAdapter(FeaturesConfig).validate_python({"kind": "clip", "path": folder}))
        if kind == "digits":
            from pipelines.demo.classifier import digits_extractor
            from pipelines.demo.evaluation import follow_captions

            return Extractors(digits_extractor(), clip), follow_captions
        return Extractors(_named(kind), clip), None
    except ValueError as error:
        raise BadRequest(f"--features or --clip: {' '.join(str(error).split())}") from None


def _check_counts(generated: Source, references: Mapping[str, Reference]) -> None:
    """Raises BadRequest where there are too few pictures for figures."""
    for name, count in [("pictures", generated.count), *((n, r.shards.count) for n, r in references.items())]:
        if count < _FEWEST:
            raise BadRequest(f"{name.replace('_', '-')}: {count} are too few to measure; at least {_FEWEST} are needed")


def _readable(generated: Source, held_out: Reference) -> bool:
    """Whether all captions are sentences about digits, so that it can be read whether they are followed."""
    from pipelines.demo.digits import parse_caption

    asked: Sequence[str] | None = None
    if isinstance(generated, Drawn):
        asked = generated.prompts if generated.originals is None else []
    if isinstance(generated, Files):
        asked = generated.captions
    if asked is None or held_out.shards.spec.caption is None:
        return False
    try:
        for caption in {*asked, *held_out.shards.captions()}:
            parse_caption(caption)
    except ValueError:
        return False
    return True


def _named(text: str) -> FeatureExtractor:
    kind, _, path = text.partition(":")
    try:
        config = TypeAdapter(FeaturesConfig).validate_python({"kind": kind, "path": path})
    except ValidationError:
        raise ValueError(f"{text!r}: write KIND:PATH with a kind of classifier, inception, dinov2 or clip") from None
    return open_extractor(config)


def _references(request: Request, subject: Subject, extractors: Extractors) -> dict[str, Reference]:
    """Held-out data, and those of the training where they are known."""
    data, training = data_of(subject, request.data, request.training_data)
    caption = request.caption
    if caption is None and subject.kind == "text_to_image" and subject.conditional:
        caption = (None if subject.config is None else subject.config.data.caption) or "txt"
    size = subject.image_size or extractors.features.size
    found = {"held_out": find_reference(data, size, caption, request.data_count, extractors)}
    if training is not None:
        found["training"] = find_reference(training, size, caption, 2 * request.data_count, extractors)
    return found


def _generated(request: Request, subject: Subject, held_out: Reference) -> Source:
    """Where the pictures come from that are measured."""
    if subject.reference is None:
        return Files.under(subject.folder, held_out.shards.spec.image_size)
    if subject.kind == "autoencoder":
        index, spec = held_out.shards.index, held_out.shards.spec
        originals = Shards.spread(index, spec, request.count)
        return Reconstructed(subject.reference, subject.tracking_uri, originals, request.perceptual)
    if subject.image_condition is not None:
        spec = replace(held_out.shards.spec, condition_image=subject.image_condition.get("member"))
        spread = Shards.spread(held_out.shards.index, spec, request.count)
        originals = replace(spread, slots=np.random.default_rng(0).permutation(spread.slots))
        seeds = [request.seed * request.count + i for i in range(originals.count)]
        return Drawn(
            subject.reference, subject.tracking_uri, None, seeds, dict(request.options), request.precision, originals
        )
    prompts = None
    if subject.conditional:
        prompts = spread_prompts(held_out.shards.captions(), request.count)
    seeds = [request.seed * request.count + i for i in range(request.count)]
    return Drawn(subject.reference, subject.tracking_uri, prompts, seeds, dict(request.options), request.precision)


def spread_prompts(captions: Sequence[str], count: int) -> list[str]:
    """`count` of the captions, spread evenly over them (each as often as any other), in a fixed random order: the first
    few stand for all."""
    places = np.arange(count) * len(captions) // count if count <= len(captions) else np.arange(count) % len(captions)
    return [captions[place] for place in np.random.default_rng(0).permutation(places)]


def _curve_sources(request: Request, generated: Drawn) -> dict[str, dict[str, Drawn]]:
    """For each setting of the sampler, the sources with other values of it, by a name for each."""
    if not request.curve_count:
        return {}
    first = generated.first(request.curve_count)
    guided = generated.prompts is not None or generated.originals is not None
    return {
        option: {
            f"{option}-{value:g}": replace(first, options={**generated.options, option: value})
            for value in values
            if value != generated.options[option]
        }
        for option, values in request.curve_settings.items()
        if option != "guidance_scale" or guided
    }


def _connect(request: Request) -> tuple[int, bool]:
    """Ray, the number of actors, and whether each has a GPU."""
    cores = psutil.cpu_count(logical=False) or 1
    cluster.join((request.actors or cores) + 1)
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    actors = request.actors or gpus or min(cores, int(resources["CPU"]))
    room = gpus or int(resources["CPU"])
    if actors > room:
        raise BadRequest(f"--actors {actors}: Ray has room for {room}")
    return actors, gpus > 0


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
        drawn |= {name: options.pop(name) for name in ("sampler", "num_steps", "guidance_scale")}
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


def _curves(
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
