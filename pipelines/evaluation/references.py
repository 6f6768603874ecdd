"""Real pictures to compare with: which data, and their features, measured once and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import BadRequest
from infra.storage import run_root
from pipelines.data.index import load_index
from pipelines.data.spec import SampleSpec
from pipelines.evaluation.measure import Extractors
from pipelines.evaluation.sources import Shards
from pipelines.evaluation.subject import Subject
from pipelines.training.run_folder import RunFolder

_VERSION = 1  # of what a store holds


@dataclass(frozen=True)
class Reference:
    """Real pictures, the digest of what they are, and the folder where their features are kept."""

    shards: Shards
    digest: str
    folder: Path

    def facts(self) -> dict[str, Any]:
        """For the store."""
        return {"url": self.shards.index.url, "index_digest": self.shards.index.digest, "digest": self.digest}


def find_reference(
    url: str,
    image_size: int,
    caption: str | None,
    count: int,
    extractors: Extractors,
    digest: str | None = None,
    index_root: str | None = None,
) -> Reference:
    """`count` samples, spread evenly over a dataset, as it was when its index had the digest, where one is given.

    The folder's name is a digest of the data, the extractors, the size and the number, so what is kept there is never
    that of others.

    Raises:
        BadRequest: there is no such dataset.
    """
    root = run_root() / "evaluation"
    index = load_index(url, index_root or str(root / "index"), digest=digest)
    shards = Shards.spread(index, SampleSpec(image_size, caption=caption), count)
    clip = None if extractors.clip is None else extractors.clip.digest
    data = [shards.index.digest, shards.count, image_size, caption]
    key = hashlib.sha256(json.dumps([_VERSION, data, extractors.features.digest, clip]).encode()).hexdigest()
    return Reference(shards, hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16], root / "references" / key[:16])


def data_of(subject: Subject, data: str | None, training_data: str | None) -> tuple[str, str | None]:
    """URLs of held-out and training data: those given, else those of the run that trained the subject.

    Raises:
        BadRequest: no held-out data are known.
    """
    config = subject.config
    if data is None and config is not None:
        data = config.data.validation_url
    if training_data is None and config is not None:
        training_data = config.data.url
    if data is None:
        raise BadRequest(
            f"{subject.name}: which real pictures to compare with is not known; name shards with --data URL"
        )
    return data, training_data


def pinned_index(subject: Subject, url: str) -> tuple[str, str] | None:
    """Digest of the index that the subject was trained by, and the folder that may hold it; None where `url` is not
    what it was trained on, or it took all shards."""
    config = subject.config
    if config is None or config.data.index is None or url != config.data.url:
        return None
    return config.data.index, RunFolder.of(config).path("index")
