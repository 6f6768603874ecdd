"""The shards of a run: to learn from and held out, and a second set of each for an objective that learns from two.

Samples of the two sets do not belong together. Each has its own order, epochs and quarantine records; what a step
gets of the second is in the batch under "other".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from infra.model_card import NOT_STATED
from pipelines.data.batch import RankBatch
from pipelines.data.fixed import read_fixed
from pipelines.data.index import DatasetIndex, load_index, with_share_of_new
from pipelines.data.order import DataOrder
from pipelines.data.seeds import mix
from pipelines.data.spec import SampleSpec

if TYPE_CHECKING:
    from contextlib import ExitStack

    from pipelines.training.config import TrainConfig

Split = Literal["train", "held_out"]
_OTHER = 1  # keeps the two orders apart, also where both sets hold as many samples


@dataclass(frozen=True)
class RunData:
    """Indexes of the shards at data.url, data.validation_url, data.other_url and data.other_validation_url.

    Attributes:
        new_share: share of an epoch that is new, where data.new_share asks for one: about that.
    """

    train: DatasetIndex
    validation: DatasetIndex | None = None
    other: DatasetIndex | None = None
    other_validation: DatasetIndex | None = None
    new_share: float | None = None

    @staticmethod
    def load(config: TrainConfig, index_root: str, **how: Any) -> RunData:
        """Read the indexes; `how` is `load_index`'s. Raises BadRequest as that does."""
        url, *others = data_urls(config).values()
        assert url is not None
        train, share = load_index(url, index_root, **how, digest=config.data.index), None
        if config.data.new_share is not None:
            old = load_index(url, index_root, **how, digest=config.data.old_index, present=False)
            train, share = with_share_of_new(train, old, config.data.new_share)
        rest = [None if url is None else load_index(url, index_root, **how) for url in others]
        return RunData(train, rest[0], rest[1], rest[2], new_share=share)

    @property
    def facts(self) -> dict[str, str]:
        """What says that the shards are the same as before, for checkpoints and lineage."""
        known = {"index_digest": self.train.digest}
        return known if self.other is None else {**known, "other_index_digest": self.other.digest}

    @property
    def samples(self) -> int:
        """Different samples at data.url: those of a shard that comes several times an epoch count once."""
        return int(sum(dict(zip(self.train.names, self.train.shard_samples, strict=True)).values()))

    def described(self, config: TrainConfig) -> dict[str, Any]:
        """For the model's card: where the data is, whose terms it is under, and what of it was used, how."""
        data = config.data
        told = {"url": data.url, "samples": self.samples, "index digest": self.train.digest}
        if self.new_share is not None:
            told["samples in an epoch"] = f"{self.train.samples}, {self.new_share:.3f} of them new"
        if self.other is not None:
            own = {"url": data.other_url, "samples": self.other.samples, "index digest": self.other.digest}
            told |= {f"other {name}": value for name, value in own.items()}
        return told | {
            "licence": data.license or NOT_STATED,
            "image": data.image or "the only one of a sample",
            "caption": data.caption or "none",
            "crop": f"{data.crop}, after resizing the shorter side to {config.objective.image_size}",
            "mirrored": "half of the images" if data.horizontal_flip else "none",
            "largest allowed share of bad samples": f"{data.max_bad_share:g}",
        }

    @property
    def drawn_like(self) -> DatasetIndex:
        """The held-out images that drawn ones should be like: of the second set, where there are two."""
        held_out = self.other_validation or self.validation
        assert held_out is not None
        return held_out

    def orders(self, config: TrainConfig) -> list[DataOrder]:
        """The order of the samples of data.url, and that of data.other_url where there is one."""
        data, seed = config.data, config.run.seed
        how = (data.lanes, data.global_batch_size, data.slots_per_lane)
        orders = [DataOrder(self.train, seed, *how)]
        if self.other is not None:
            orders.append(DataOrder(self.other, int(mix(seed, _OTHER).item() >> 2), *how))
        return orders

    def batches(
        self, config: TrainConfig, spec: SampleSpec, rank: int, world_size: int, start_step: int, closing: ExitStack
    ) -> Iterator[RankBatch]:
        """The rank's batches from a step on, read ahead; the streams are closed with `closing`."""
        from pipelines.data.stream import training_batches

        orders = self.orders(config)
        streams = [
            closing.enter_context(
                training_batches(
                    order=order,
                    spec=spec,
                    rank=rank,
                    world_size=world_size,
                    start_step=start_step,
                    end_step=config.run.steps,
                    concurrency=config.data.read_cpus / len(orders),
                    prefetch=config.data.prefetch_batches,
                )
            )
            for order in orders
        ]
        return streams[0] if len(streams) == 1 else map(beside, *streams)

    def fixed(
        self, split: Split, spec: SampleSpec, count: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[RankBatch]:
        """`read_fixed` of a split; of two sets as many samples of each as the smaller one has, at most."""
        own, other = (self.train, self.other) if split == "train" else (self.validation, self.other_validation)
        assert own is not None
        if other is None:
            return read_fixed(own, spec, count, batch_size, rank, world_size)
        part = (min(count, own.samples, other.samples), batch_size, rank, world_size)
        return map(beside, read_fixed(own, spec, *part), read_fixed(other, spec, *part))


def beside(batch: RankBatch, other: RankBatch) -> RankBatch:
    """A step's samples of both sets."""
    batch["other"] = other
    return batch


def parts(batch: RankBatch) -> list[tuple[str, RankBatch]]:
    """The samples of a batch by set: "" is that of data.url, "other" the second, where there is one."""
    return [("", batch), *([("other", batch["other"])] if "other" in batch else [])]


def data_urls(config: TrainConfig) -> dict[str, str | None]:
    """Where the shards are, by key of the configuration, in the order of `RunData`."""
    names = ("url", "validation_url", "other_url", "other_validation_url")
    return {f"data.{name}": getattr(config.data, name) for name in names}
