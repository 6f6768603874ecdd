"""What an evaluation is asked for, and what follows: extractors, real pictures, and the source of the measured ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from genmodels.features.config import FeaturesConfig
from genmodels.features.extractor import FeatureExtractor, open_extractor
from infra.errors import BadRequest
from infra.registry import resolve_model
from pipelines.evaluation.figures import Reader
from pipelines.evaluation.measure import Extractors
from pipelines.evaluation.references import Reference, data_of, find_reference, pinned_index
from pipelines.evaluation.sources import Drawn, Files, Reconstructed, Shards, Source
from pipelines.evaluation.subject import Subject

_FEWEST = 10  # pictures of a set


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
    training_index: tuple[str, str] | None = None  # digest and folder, see `pinned_index`
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


def extractors_of(request: Request, subject: Subject) -> tuple[Extractors, Reader | None]:
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


def check_counts(generated: Source, references: Mapping[str, Reference]) -> None:
    """Raises BadRequest where there are too few pictures for figures."""
    for name, count in [("pictures", generated.count), *((n, r.shards.count) for n, r in references.items())]:
        if count < _FEWEST:
            raise BadRequest(f"{name.replace('_', '-')}: {count} are too few to measure; at least {_FEWEST} are needed")


def readable(generated: Source, held_out: Reference) -> bool:
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


def references_of(request: Request, subject: Subject, extractors: Extractors) -> dict[str, Reference]:
    """Held-out data, and those of the training where they are known."""
    data, training = data_of(subject, request.data, request.training_data)
    caption = request.caption
    if caption is None and subject.kind == "text_to_image" and subject.conditional:
        caption = (None if subject.config is None else subject.config.data.caption) or "txt"
    size = subject.image_size or extractors.features.size
    found = {"held_out": find_reference(data, size, caption, request.data_count, extractors)}
    if training is not None:
        pinned = request.training_index or pinned_index(subject, training) or (None, None)
        found["training"] = find_reference(training, size, caption, 2 * request.data_count, extractors, *pinned)
    return found


def generated_of(request: Request, subject: Subject, held_out: Reference) -> Source:
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


def curve_sources(request: Request, generated: Drawn) -> dict[str, dict[str, Drawn]]:
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
        if option in generated.options and (option != "guidance_scale" or guided)
    }
