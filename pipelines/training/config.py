"""One training run as one validated object: a YAML preset, with `dotted.key=value` overrides merged in before.

Every field has a description: `--help` prints them. A mistake anywhere is reported together with all others, before
any worker starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from genmodels.config import Section
from genmodels.families import ObjectiveConfig, members_of, objective_class
from genmodels.features.config import FeaturesConfig
from genmodels.power_ema import exponent
from infra.errors import BadRequest
from infra.storage import is_remote
from pipelines.training.explain import explain
from pipelines.training.presets import override, read_preset, with_run_root

if TYPE_CHECKING:
    from torch import nn


def absolute_url(url: str | None) -> str | None:
    """A local path made absolute; any other URL as it is. Raises ValueError for a scheme that is not known.

    A Ray job runs in a copy of the sources: what is relative would be lost with it.
    """
    try:
        if url is None or url.startswith("pipe:") or is_remote(url):  # a pipe is refused where the shards are listed
            return url
    except BadRequest as error:
        raise ValueError(str(error)) from None
    return str(Path(url.removeprefix("file://")).expanduser().absolute())


def folder_name(name: str) -> str:
    """A name that is one folder's. Raises ValueError for any other."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{name!r} names no folder: use letters, digits and . _ - after a letter or digit")
    return name


class RunConfig(Section):
    """What the run is called, how long it is, and how often it does what."""

    name: str = Field(description="names the run's folder; the same name resumes, a new one starts anew")
    root: str | None = Field(None, description="folder or s3:// URL that holds runs [RUN_ROOT, else ~/genmodels-runs]")
    seed: int = Field(0, description="all randomness follows from it and from the position in the data")
    steps: int = Field(gt=0, description="training steps; one step consumes one global batch")
    max_hours: float | None = Field(
        None, gt=0, description="hours of training after which it ends, at the next logged step [run.steps alone]"
    )
    log_every: int = Field(10, gt=0, description="steps between logged metrics")
    checkpoint_every: int = Field(200, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0, description="checkpoints kept")
    validate_every: int = Field(200, gt=0, description="steps between validations on held-out shards")
    validation_samples: int = Field(256, ge=0, description="held-out samples in a validation")
    preview_every: int = Field(0, ge=0, description="steps between sample grids; 0: at the end only")
    preview_samples: int = Field(16, ge=0, description="pictures in a sample grid")
    finish_samples: int = Field(
        1024, gt=0, description="training samples for what is measured at the end (latent scale)"
    )
    max_skipped_steps: int = Field(20, gt=0, description="non-finite steps in a row after which the run stops")
    audit: bool = Field(False, description="record key, seed and pixel hash of every sample that the objective sees")
    init_from: str | None = Field(
        None, description="start from these weights: an export folder, a run's folder, or models:/NAME@ALIAS"
    )

    _names_a_folder = field_validator("name")(folder_name)

    continue_from: str | None = Field(
        None,
        description="begin where another run stands: its folder or a checkpoint's, with optimizer, averages and place "
        "in the same data",
    )

    _root_is_absolute = field_validator("root")(absolute_url)


class DataConfig(Section):
    """Where the shards are and in which order they are read."""

    url: str = Field(description="folder, glob or s3:// URL of webdataset shards")
    demo: Literal["digits"] | None = Field(
        None, description="draw these shards first (train/ and held_out/ beside each other) where url has none"
    )
    demo_size: int | None = Field(
        None, gt=7, description="height and width of what data.demo draws [objective.image_size]"
    )
    demo_repeats: int = Field(8, gt=0, description="drawings of each digit for data.demo")
    validation_url: str | None = Field(None, description="held-out shards; none: no validation")
    other_url: str | None = Field(
        None, description="a second set, of images that do not belong to the first's (cycle_gan); it may be of any size"
    )
    other_validation_url: str | None = Field(None, description="held-out shards of the second set")
    global_batch_size: int = Field(64, gt=0, description="samples a step, over all workers; lanes divide it")
    micro_batch: int | None = Field(
        None, gt=0, description="samples a worker computes at once [all of its share of a step]"
    )
    lanes: int = Field(
        8,
        gt=0,
        description="independent streams of the data order; any worker count that divides it sees the same batches",
    )
    slots_per_lane: int = Field(64, gt=0, description="neighbouring slots a lane reads and shuffles together")
    crop: Literal["center", "random"] = Field("center", description="after resizing the shorter side")
    horizontal_flip: bool = Field(False, description="mirror half of the images")
    image: str | None = Field(None, description="shard member with the image, as photo.png [the only jpg, png, …]")
    caption: str | None = Field("txt", description="shard member with the caption: txt, or json:KEY; null: images only")
    index: str | None = Field(
        None, description="digest of the index of url to read by, whatever has arrived since [that of all shards]"
    )
    old_index: str | None = Field(None, description="digest of an earlier index of url: what it lacks is new")
    new_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of an epoch that is new; new or old shards come several times for it [once]",
    )
    license: str | None = Field(None, description="of images and captions, for the model's card")
    max_bad_share: float = Field(0.001, ge=0, le=1, description="share of bad samples above which the run stops")
    read_cpus: float = Field(1, gt=0, description="CPUs that Ray Data may use for each worker's reading")
    prefetch_batches: int = Field(4, gt=0, description="batches of a worker read ahead, of each set")

    _paths_are_absolute = field_validator("url", "validation_url", "other_url", "other_validation_url")(absolute_url)


class OptimizerConfig(Section):
    """AdamW, and a learning rate that depends on the step alone."""

    learning_rate: float = Field(1e-4, gt=0, description="after warm-up")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="from the end of warm-up to the last step"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise from 0")
    final_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="last learning rate over the first, for cosine and linear"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="share of the old mean of gradients kept at each step")
    beta2: float = Field(0.999, ge=0, lt=1, description="share of the old mean of squared gradients kept at each step")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of that mean")
    weight_decay: float = Field(
        0.01, ge=0, description="times the learning rate: share of each weight taken off a step"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0: never")
    freeze: list[str] = Field(
        [], description="patterns of names of parameters that are not trained, such as backbone.down_blocks.*"
    )


class EngineConfig(Section):
    """How one network is trained: by DeepSpeed at a ZeRO stage, or by plain torch."""

    kind: Literal["deepspeed", "torch"] = Field("deepspeed", description="torch: no sharding, for comparison")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="shards: 1 optimizer state, 2 and gradients, 3 and parameters"
    )
    bucket_elements: int = Field(5_000_000, gt=0, description="elements in one communication bucket")
    persistence_threshold: int = Field(100_000, ge=0, description="stage 3 keeps parameters below this size whole")


class WorkersConfig(Section):
    """How many training workers, and what each takes from the cluster."""

    count: int = Field(1, gt=0, description="training workers (ranks)")
    use_gpu: bool = Field(False, description="one GPU for each worker")
    cpus: float = Field(1, gt=0, description="logical CPUs for each worker")
    threads: int | None = Field(
        None, gt=0, description="torch threads in each worker [physical cores over workers on the node]"
    )
    max_failures: int = Field(3, ge=-1, description="restarts after a worker or node died; -1: without limit")
    local_cpus: int | None = Field(
        None,
        gt=0,
        description="logical CPUs of a Ray that the job starts itself [what the run needs, at least the machine's]",
    )


class PrecisionConfig(Section):
    """Number formats and what trades memory for time."""

    compute: Literal["fp32", "bf16", "auto"] = Field(
        "fp32",
        description="bf16: matrix products under autocast; weights, EMA and optimizer stay fp32; "
        "auto: bf16 where the device has instructions for it",
    )
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    compile: bool = Field(False, description="torch.compile the networks")
    channels_last: bool = Field(False, description="lay images out channels-last")


class EmaConfig(Section):
    """Exponential moving average of the weights, fp32: what validation, grids and the export use."""

    decay: float = Field(0.999, ge=0, lt=1, description="share of the old average kept at each step; 0: no averaging")
    warmup: bool = Field(True, description="decay at step n is at most (1+n)/(10+n)")
    lengths: list[float] = Field(
        [], description="power-function averages stored too, [0.05, 0.1] is usual: export_model.py makes others of them"
    )
    store_every: int = Field(1000, gt=0, description="steps between stored averages, for ema.lengths")

    @model_validator(mode="after")
    def _are_lengths(self) -> EmaConfig:
        for length in self.lengths:
            exponent(length)  # raises ValueError
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError("lengths are different ones")
        return self


class EvaluationConfig(Section):
    """Pictures drawn from held-out captions during training, and how far they are from real ones."""

    every: int = Field(0, ge=0, description="steps between evaluations, and one at the end; 0: none")
    count: int = Field(500, ge=2, description="pictures drawn in each")
    reference_count: int = Field(5000, ge=2, description="real held-out pictures that they are compared with")
    num_steps: int = Field(20, gt=0, description="of the sampler")
    guidance_scale: float = Field(2.0, description="1 is no guidance")
    sampler: Literal["ddpm", "ddim", "dpm_solver++", "euler", "heun", "euler_ancestral"] = Field(
        "ddim", description="heun makes two passes a step"
    )
    features: FeaturesConfig | None = Field(
        None, description="what looks at the pictures [a classifier of digits, where data.demo is digits]"
    )


class BestConfig(Section):
    """Which checkpoint is the best one, which is kept and published, and when training ends for want of a better."""

    metric: str | None = Field(
        None, description="val_loss, val_frechet_distance or another that is measured now and then; null: none is kept"
    )
    better: Literal["lower", "higher"] = Field("lower", description="which way is an improvement")
    patience: int = Field(0, ge=0, description="measurements without improvement after which training ends; 0: never")


class TrackingConfig(Section):
    """MLflow: where runs are recorded and under which name the result is registered."""

    uri: str | None = Field(
        None, description="MLflow tracking server [MLFLOW_TRACKING_URI, else SQLite under the run root]"
    )
    experiment: str = Field("genmodels", description="MLflow experiment of the run")
    register_as: str | None = Field(None, description="registered model name; null: not registered")
    system_metrics: bool = Field(True, description="CPU, memory and GPU use on the run")

    @field_validator("register_as")
    @classmethod
    def _can_be_registered(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[^/:@']+", name):
            raise ValueError(f"{name!r} cannot name a model: leave out / : @ and ', or use null for none")
        return name


class TrainConfig(Section):
    """A whole training run."""

    run: RunConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    optimizers: dict[str, OptimizerConfig] = Field({}, description="by network, where one differs")
    engine: EngineConfig = EngineConfig()
    engines: dict[str, EngineConfig] = Field({}, description="by network, where one differs")
    workers: WorkersConfig = WorkersConfig()
    precision: PrecisionConfig = PrecisionConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    best: BestConfig = BestConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        data, world, wrong = self.data, self.workers.count, []
        if data.lanes % world:
            allowed = [n for n in range(1, data.lanes + 1) if data.lanes % n == 0]
            wrong.append(
                f"workers.count={world} does not divide data.lanes={data.lanes}: use one of {allowed}, or other lanes"
            )
        if data.global_batch_size % data.lanes:
            wrong.append(
                f"data.global_batch_size={data.global_batch_size} is not a multiple of data.lanes={data.lanes}"
            )
        share = data.global_batch_size // world
        if not wrong and data.micro_batch and share % data.micro_batch:
            wrong.append(f"data.micro_batch={data.micro_batch} does not divide a worker's share of a step, {share}")
        if (data.crop != "center" or data.horizontal_flip) and any(
            map(_reads_arrays, members_of(self.objective).values())
        ):
            wrong.append(
                "embeddings and latents in the shards are of the centre of each image: set data.crop=center and "
                "data.horizontal_flip=false, or read none (member: null)"
            )
        if getattr(self.objective, "unpaired", False):
            if data.other_url is None:
                wrong.append(f"objective.kind={self.objective.kind} learns from two sets: name data.other_url")
            if (data.validation_url is None) != (data.other_validation_url is None):
                wrong.append("data.validation_url and data.other_validation_url go together: a set held out of each")
        elif data.other_url or data.other_validation_url:
            given = "other_url" if data.other_url else "other_validation_url"
            wrong.append(f"data.{given} is of cycle_gan: objective.kind={self.objective.kind} learns from one set")
        if data.caption is None and getattr(self.objective, "conditional", False):
            wrong.append("data.caption is null, and this objective learns from captions: name their shard member (txt)")
        for name, member in members_of(self.objective).items():
            if getattr(member, "lora", None) is not None and self.run.init_from is None:
                section = f"objective.members.{name}" if name else "objective"
                wrong.append(f"{section}.lora adapts a trained model: name it with run.init_from")
        if self.tracking.register_as is not None and self.objective.kind == "side_by_side":
            wrong.append("tracking.register_as names one model: with objective.kind=side_by_side, leave it null")
        if self.evaluation.every and data.validation_url is None:
            wrong.append("evaluation.every needs held-out pictures: name data.validation_url")
        if self.evaluation.every and self.evaluation.features is None and data.demo != "digits":
            wrong.append("evaluation.every needs a feature extractor: name evaluation.features.kind and .path")
        if self.best.patience and self.best.metric is None:
            wrong.append("best.patience waits for a better best.metric: name one")
        metric = self.best.metric
        if metric is not None and (not metric.startswith("val_") or data.validation_url is None):
            wrong.append(
                "best.metric is measured on held-out data: a name that begins with val_, and data.validation_url"
            )
        if metric is not None and self.best.better == "lower" and any(part in metric for part in _HIGHER):
            wrong.append(f"best.metric={metric} is better the higher it is: set best.better=higher")
        if metric in _OF_DISCRIMINATORS and self.objective.kind in ("gan", "attn_gan"):
            wrong.append(
                f"best.metric={metric} says how well the discriminator does, not what is drawn: take "
                "val_frechet_distance or val_coverage"
            )
        if metric in _DRAWN and not self.evaluation.every:
            wrong.append(f"best.metric={metric} is measured by evaluation.every: set it")
        if data.new_share is not None and data.old_index is None:
            wrong.append("data.new_share needs data.old_index: what is not in it is new")
        if self.run.init_from is not None and self.run.continue_from is not None:
            wrong.append("run.init_from takes weights alone, run.continue_from all state of a run: give one of them")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def accumulation(self) -> int:
        """Micro-batches in a step of one worker."""
        return self.data.global_batch_size // self.workers.count // self.rank_micro_batch

    @property
    def rank_micro_batch(self) -> int:
        return self.data.micro_batch or self.data.global_batch_size // self.workers.count

    def engine_of(self, network: str) -> EngineConfig:
        return self.engines.get(network, self.engine)

    def optimizer_of(self, network: str) -> OptimizerConfig:
        return self.optimizers.get(network, self.optimizer)


def _reads_arrays(objective: Any) -> bool:
    """Whether an objective reads embeddings or latents from the shards."""
    stored = (getattr(objective, "embedding_member", None), getattr(objective, "latent_member", None))
    return any(stored) or getattr(getattr(objective, "image_embedding", None), "member", None) is not None


_HIGHER = ("accuracy", "recall", "cosine", "psnr", "coverage", "spread", "nearest", "of_one_condition", "caption_found")
_DRAWN = (
    "val_frechet_distance", "val_coverage", "val_recall", "val_spread", "val_nearest", "val_of_one_condition",
    "val_collapsed",
)  # fmt: skip
_OF_DISCRIMINATORS = ("val_loss", "val_accuracy", "val_accuracy_real", "val_accuracy_fake")

# What a run may change and still be the same run, resumed.
MAY_CHANGE = (
    "run.root", "run.steps", "run.max_hours", "run.log_every", "run.checkpoint_every", "run.keep_checkpoints",
    "run.validate_every", "run.validation_samples", "run.audit", "ema.store_every", "evaluation", "best",
    "run.preview_every", "run.preview_samples", "run.max_skipped_steps", "data.micro_batch", "data.read_cpus",
    "data.prefetch_batches", "data.max_bad_share", "data.license", "engine", "engines", "workers", "tracking",
    "precision.compile", "precision.activation_checkpointing", "precision.channels_last", "objective.zero_shot",
)  # fmt: skip


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def logged(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration as parameters of an MLflow run: flat; names that users chose, such as classes, are one value."""
    flat: dict[str, Any] = {}
    for key, value in flatten(tree).items():
        section, mark, name = key.partition(".classes.")
        if mark:
            flat[f"{section}.classes"] = {**flat.get(f"{section}.classes", {}), name: value}
        else:
            flat[key] = value
    return flat


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences between two resolved configurations that make it another run, one line each."""
    before, after = flatten(old), flatten(new)
    found = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE):
            continue
        if before.get(key) != after.get(key):
            found.append(f"{key}: {json.dumps(before.get(key))} → {json.dumps(after.get(key))}")
    return found


def load_config(preset: str | dict[str, Any], assignments: list[str]) -> TrainConfig:
    """Read a preset (or take its tree), merge the overrides, validate once.

    Raises:
        BadRequest: every mistake at once, each naming the key and what is allowed.
    """
    try:
        tree = preset if isinstance(preset, dict) else read_preset(preset)
        config = TrainConfig.model_validate(with_run_root(override(tree, assignments)))
    except ValidationError as error:
        raise BadRequest("; ".join(explain(error, TrainConfig))) from None
    check_networks(config)
    check_losses(config)
    return config


def abstract_networks(config: TrainConfig) -> dict[str, nn.Module]:
    """The networks that are trained, on the meta device. Raises BadRequest where their parts do not fit."""
    try:
        return objective_class(config.objective.kind).abstract_networks(config.objective)
    except ValueError as error:
        raise BadRequest(f"objective: {' '.join(str(error).split())}") from None


def check_networks(config: TrainConfig) -> None:
    """Raises BadRequest where `engines` or `optimizers` names a network that the objective does not have."""
    sections: dict[str, Mapping[str, Section]] = {"engines": config.engines, "optimizers": config.optimizers}
    if not any(sections.values()):
        return
    networks = abstract_networks(config)
    for section, chosen in sections.items():
        for name in chosen.keys() - networks.keys():
            raise BadRequest(f"{section}.{name}: there is no such network in the objective, only {', '.join(networks)}")


def check_losses(config: TrainConfig) -> None:
    """Raises BadRequest where the configuration alone shows that accumulation or ZeRO would change a loss."""
    for name, member in members_of(config.objective).items():
        if config.accumulation > 1 and getattr(member, "couples_samples", False):
            raise BadRequest(
                f"objective.kind={member.kind} couples the samples of a batch, so accumulation would change it: set "
                f"data.micro_batch={config.data.global_batch_size // config.workers.count}"
            )
        network = f"{name}-discriminator" if name else "discriminator"
        engine, penalties = config.engine_of(network), getattr(member, "penalties", None)
        if penalties is not None and penalties.any and engine.kind == "deepspeed" and engine.zero_stage == 3:
            raise BadRequest(
                f"the loss of {network!r} differentiates a gradient (objective.penalties), which ZeRO stage 3 cannot: "
                f"set engines.{network}.zero_stage to 2 or less"
            )
