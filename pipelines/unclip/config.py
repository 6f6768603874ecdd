"""What `train_unclip.py` trains: the presets of all stages, and how the joined model draws."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from genmodels.config import Section
from genmodels.unclip.layout import check_augmentation, check_truncation
from infra import storage
from infra.errors import BadRequest
from pipelines.data.decode import IMAGE_SUFFIXES
from pipelines.training.config import TrainConfig, absolute_url, changes, folder_name, load_config
from pipelines.training.embeddings import clip_reference, embedding_member
from pipelines.training.explain import explain
from pipelines.training.presets import override, read_preset, with_run_root

_TAKEN = ("clip", "decoder")
_SAMPLERS = Literal["ddpm", "ddim", "dpm_solver++", "euler", "heun", "euler_ancestral"]


class PriorDrawing(Section):
    """How a prior draws; the last two are the diffusion prior's alone."""

    guidance_scale: float = Field(1.0, description="1 is no guidance")
    num_steps: int | None = Field(None, gt=0, description="of its sampler [25]")
    candidates: int | None = Field(None, gt=0, description="draws, of which the one nearest to the caption is kept [2]")


class DecoderDrawing(Section):
    """How the decoder draws, where nothing else is asked for."""

    num_steps: int = Field(20, gt=0, description="of the sampler")
    guidance_scale: float = Field(2.0, description="1 is no guidance")
    sampler: _SAMPLERS = Field("ddim", description="heun makes two passes a step")


class UpsamplerDrawing(Section):
    """How an upsampler draws."""

    num_steps: int = Field(10, gt=0, description="of the sampler")
    sampler: _SAMPLERS = Field("ddim", description="heun makes two passes a step")
    augmentation_level: float = Field(0.0, ge=0, le=1, description="of noise on the picture that it is told")
    augmentation: Literal["non_truncated", "truncated"] = Field(
        "non_truncated", description="truncated: of the first, the decoder ends where its picture is no noisier"
    )


class DrawingConfig(Section):
    """How all stages draw together."""

    priors: dict[str, PriorDrawing] = Field({}, description="by name")
    decoder: DecoderDrawing = DecoderDrawing()
    upsamplers: dict[str, UpsamplerDrawing] = Field({}, description="by name")


class TrainedClip(Section):
    """A CLIP that is trained already: it is copied into the folder of the joined model, for all stages."""

    path: str = Field(description="folder, checkpoint or models:/NAME of a CLIP, or hub name of a CLIPModel")
    data_url: str = Field(description="shards with images and captions: what embeddings are made of")
    validation_url: str | None = Field(None, description="held-out shards, likewise")
    caption: str | None = Field("txt", description="shard member with the caption, as data.caption")
    samples: int = Field(10_000, gt=1, description="to measure how the embeddings are distributed, if it came without")

    _paths_are_absolute = field_validator("data_url", "validation_url")(absolute_url)


class UnclipConfig(Section):
    """All stages: CLIP, priors, decoder, upsamplers; without CLIP and priors a cascade that reads captions alone."""

    name: str = Field(description="names the folder of the joined model, and the MLflow run of all stages")
    clip: str | None = Field(
        None, description="preset of the CLIP; null: trained_clip, or none, as in Imagen's cascade"
    )
    trained_clip: TrainedClip | None = Field(None, description="in place of clip: one that is trained already")
    priors: dict[str, str] = Field({}, description="presets of the priors by name; the first is drawn with")
    decoder: str = Field(description="preset of the decoder")
    upsamplers: dict[str, str] = Field({}, description="presets of the upsamplers by name, from small to large")
    keep: list[str] = Field(["txt", "json"], description="members that the shards with embeddings keep")
    actors: int | None = Field(None, gt=0, description="processes that embed side by side [a core, or GPU, each]")
    gpus: bool = Field(False, description="embed with one GPU for each of them")
    drawing: DrawingConfig = DrawingConfig()
    root: str | None = Field(None, description="as run.root, of all stages")
    tracking_uri: str | None = Field(None, description="as tracking.uri, of all stages")
    experiment: str = Field("genmodels", description="MLflow experiment")
    register_as: str | None = Field(None, description="registered model name of the joined model; null: not registered")

    _names_a_folder = field_validator("name")(folder_name)

    @model_validator(mode="after")
    def _names_are_different(self) -> UnclipConfig:
        if self.clip is not None and self.trained_clip is not None:
            raise ValueError("clip is trained first, trained_clip is taken as it is: give one")
        if (self.clip is None and self.trained_clip is None) != (not self.priors):
            raise ValueError("clip and priors go together: name both, or none for a cascade that reads captions alone")
        names = [*_TAKEN, *self.priors, *self.upsamplers]
        for name in {*self.priors, *self.upsamplers}:
            if names.count(name) > 1 or not re.fullmatch(r"[a-z]\w*", name):
                raise ValueError(f"{name!r} cannot name a stage: use small letters, digits and _, each name once")
        for part, known in (("priors", self.priors), ("upsamplers", self.upsamplers)):
            if unknown := getattr(self.drawing, part).keys() - known.keys():
                raise ValueError(f"drawing.{part}: there is no {', '.join(sorted(unknown))}, only {', '.join(known)}")
        return self

    def upsampler_drawing(self, name: str) -> UpsamplerDrawing:
        """How an upsampler draws."""
        return self.drawing.upsamplers.get(name, UpsamplerDrawing())

    @property
    def stages(self) -> dict[str, str]:
        """Presets of all stages by name, in the order of training."""
        first = {} if self.clip is None else {"clip": self.clip}
        return {**first, **self.priors, "decoder": self.decoder, **self.upsamplers}


@dataclass(frozen=True)
class Stages:
    """A resolved `UnclipConfig`: the training of each stage by name, in order."""

    config: UnclipConfig
    trainings: dict[str, TrainConfig]


def load_stages(preset: str, assignments: list[str]) -> Stages:
    """Read a preset of all stages and those of each; `STAGE.dotted.key=value` overrides a stage's.

    Raises:
        BadRequest: a preset is wrong, or stages do not fit one another; nothing was started.
    """
    tree = read_preset(preset)
    names = [
        *(["clip"] if tree.get("trained_clip") is None else []),
        "decoder",
        *(tree.get("priors") or {}),
        *(tree.get("upsamplers") or {}),
    ]
    of_stages: dict[str, list[str]] = {name: [] for name in names}
    own: list[str] = []
    for assignment in assignments:
        stage, dot, _ = assignment.partition("=")[0].partition(".")
        if dot and stage in of_stages:
            of_stages[stage].append(assignment[len(stage) + 1 :])
        else:
            own.append(assignment)
    try:
        config = UnclipConfig.model_validate(with_run_root(override(tree, own)))
    except ValidationError as error:
        raise BadRequest("; ".join(explain(error, UnclipConfig))) from None
    shared = [f"tracking.experiment={config.experiment}"]
    shared += [] if config.root is None else [f"run.root={config.root}"]
    shared += [] if config.tracking_uri is None else [f"tracking.uri={config.tracking_uri}"]
    trainings = {}
    for name, wanted in config.stages.items():
        try:
            trainings[name] = load_config(wanted, [*shared, *of_stages[name]])
        except BadRequest as error:
            raise BadRequest(f"{name}: {error}") from None
    if config.clip is None and (unused := of_stages.get("clip")):
        raise BadRequest(f"clip.{unused[0]}: no CLIP is trained here; leave it out, or name one with clip=PRESET")
    if config.clip is not None and of_stages["clip"]:
        trainings = _with_this_clip(trainings, config.clip, shared)
    if config.trained_clip is not None:
        place = clip_folder(config, next(iter(trainings.values())))
        trainings = {name: _told_of(training, place) for name, training in trainings.items()}
    check_stages(config, trainings)
    return Stages(config, trainings)


def clip_folder(config: UnclipConfig, training: TrainConfig) -> str:
    """Where a CLIP that is trained already is copied to."""
    from pipelines.training.run_folder import root_of

    return storage.join(root_of(training), config.name, "clip")


def _told_of(training: TrainConfig, clip: str) -> TrainConfig:
    """A stage with its CLIP's place wherever it names the one of its preset; others as they are."""
    found = clip_reference(training.objective)
    return training if found is None else _renamed(training, found[1], clip)


def _with_this_clip(trainings: dict[str, TrainConfig], preset: str, shared: list[str]) -> dict[str, TrainConfig]:
    """Stages that name the CLIP's preset name its run in place, where it is trained otherwise than the preset says."""
    own = trainings["clip"]
    try:
        plain = load_config(preset, shared)
    except BadRequest:  # it leaves something to be given, so nobody trains it by its name
        pass
    else:
        differs = changes(json.loads(plain.model_dump_json()), json.loads(own.model_dump_json()))
        # What decides may change while a run goes on, and yet another CLIP comes of it.
        if not differs and _decides(plain) == _decides(own):
            return trainings
    return {name: _renamed(training, f"preset:{preset}", own.run.name) for name, training in trainings.items()}


def _decides(training: TrainConfig) -> tuple[Any, ...]:
    return training.run.root, training.run.steps, training.best, training.evaluation


def _renamed(training: TrainConfig, old: str, new: str) -> TrainConfig:
    """A training that refers to `new` wherever it referred to `old`."""
    text = json.dumps(json.loads(training.model_dump_json()))
    return TrainConfig.model_validate_json(text.replace(json.dumps(old), json.dumps(new)))


def check_stages(config: UnclipConfig, trainings: dict[str, TrainConfig]) -> None:
    """Raise BadRequest where stages are of another kind, or do not follow one another in size."""
    kinds = {"clip": ("clip",), **dict.fromkeys(config.priors, ("diffusion_prior", "autoregressive_prior"))}
    for name, training in trainings.items():
        allowed = kinds.get(name, ("latent_diffusion",))
        if training.objective.kind not in allowed:
            raise BadRequest(
                f"{name}: trains objective.kind={training.objective.kind}, and should {' or '.join(allowed)}"
            )
    names = [config.name, *(training.run.name for training in trainings.values())]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadRequest(f"{', '.join(twice)} names several folders of runs: give each stage another run.name")
    _check_told(config, trainings)
    _check_drawing(config, trainings)
    _check_kept(config, trainings)
    _check_upsamplers(config, trainings)
    for name in config.priors:
        drawn = config.drawing.priors.get(name, PriorDrawing())
        steps = drawn.num_steps is not None or drawn.candidates is not None
        if steps and trainings[name].objective.kind != "diffusion_prior":
            raise BadRequest(f"drawing.priors.{name}: num_steps and candidates are of diffusion priors")


def _check_told(config: UnclipConfig, trainings: dict[str, TrainConfig]) -> None:
    """The decoder is told what there is: embeddings of the priors' CLIP, or captions."""
    decoder = trainings["decoder"].objective
    embedding = getattr(decoder, "image_embedding", None)
    if embedding is None and config.priors:
        raise BadRequest("decoder: is told no image embeddings: set decoder.objective.image_embedding.clip")
    if embedding is not None and not config.priors:
        raise BadRequest("decoder: is told image embeddings, and there is no prior: name clip and priors")
    if not config.priors and not getattr(decoder, "takes_text", False):
        raise BadRequest("decoder: reads no captions, and there is no prior that does: set objective.text_encoder")
    references: dict[str, str] = {}
    for name in (*config.priors, "decoder") if config.priors else ():
        found = clip_reference(trainings[name].objective)
        assert found is not None
        references[name] = found[1]
    if len(set(references.values())) > 1:
        told = "; ".join(f"{name}: {reference}" for name, reference in references.items())
        raise BadRequest(f"the stages name different CLIPs: {told}; give all the same")
    if config.clip is not None:
        allowed = (f"preset:{config.clip}", trainings["clip"].run.name)
        for name, reference in references.items():
            if reference not in allowed:
                raise BadRequest(f"clip={config.clip} is trained, and {name} stands on another: {reference}; name one")


def _check_drawing(config: UnclipConfig, trainings: dict[str, TrainConfig]) -> None:
    """What is drawn with can be drawn with."""
    drawn: dict[str, DecoderDrawing | UpsamplerDrawing] = {"decoder": config.drawing.decoder}
    drawn |= {f"upsamplers.{name}": config.upsampler_drawing(name) for name in config.upsamplers}
    for name, drawing in drawn.items():
        objective: Any = trainings[name.rpartition(".")[2]].objective
        if drawing.num_steps > objective.train_timesteps:
            most = objective.train_timesteps
            raise BadRequest(f"drawing.{name}.num_steps={drawing.num_steps}: it was trained with {most} timesteps")
    first = next(iter(config.upsamplers), None)
    if first is None or config.upsampler_drawing(first).augmentation != "truncated":
        return
    decoder: Any = trainings["decoder"].objective
    try:
        pixels = decoder.autoencoder is None and decoder.noise_schedule not in ("flow", "edm")
        check_truncation(pixels, config.drawing.decoder.sampler)
    except ValueError as error:
        raise BadRequest(f"drawing.upsamplers.{first}: {error}") from None


def _check_kept(config: UnclipConfig, trainings: dict[str, TrainConfig]) -> None:
    """What stages read beside embeddings is kept in the shards that are written for them."""
    source = trainings["clip"].data.url if config.trained_clip is None and config.clip is not None else None
    source = config.trained_clip.data_url if config.trained_clip is not None else source
    for name, training in trainings.items():
        objective: Any = training.objective
        if source is None or embedding_member(objective) is None or training.data.url == source:
            continue
        told = getattr(objective, "image_embedding", None) is not None
        if told and objective.latent_member is None and not {*config.keep} & {*IMAGE_SUFFIXES}:
            raise BadRequest(
                f"{name}: reads images beside their embeddings, and keep={','.join(config.keep)} leaves them out: add "
                "the images' member, such as jpg"
            )
        caption = (training.data.caption or "").partition(":")[0]
        if caption and getattr(objective, "conditional", False) and caption not in config.keep:
            raise BadRequest(f"{name}: reads captions from {caption}, which keep={','.join(config.keep)} leaves out")


def _check_upsamplers(config: UnclipConfig, trainings: dict[str, TrainConfig]) -> None:
    """Each begins at the size where the stage before it ends, and draws as it was trained."""
    size, before = trainings["decoder"].objective.image_size, "decoder"
    for name in config.upsamplers:
        objective: Any = trainings[name].objective
        told = objective.image_condition
        if told is None or told.kind != "low_resolution":
            raise BadRequest(f"{name}: is no upsampler: set {name}.objective.image_condition.kind=low_resolution")
        if objective.image_size != size * told.factor:
            raise BadRequest(
                f"{name}: makes {objective.image_size} pixels of {objective.image_size // told.factor}, and {before} "
                f"draws {size}: the sizes of stages must follow one another"
            )
        if objective.autoencoder is not None or objective.conditional:
            raise BadRequest(f"{name}: an upsampler makes pixels, and is told neither captions nor classes")
        drawing = config.upsampler_drawing(name).model_dump()
        try:
            check_augmentation(name, before == "decoder", told.augmentation, drawing)
        except ValueError as error:
            raise BadRequest(f"drawing.upsamplers.{error}") from None
        size, before = objective.image_size, name
