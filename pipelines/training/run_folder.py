"""The folder of one run: what is where, and what makes a configuration the same run.

RUN_ROOT/NAME/config.json     the resolved configuration, as of the last launch
              run.json        MLflow run id, tracking URI
              inputs/         what the objective needs from elsewhere: autoencoder/, tokenizer/, …
              index/          indexes of read-only datasets
              checkpoints/    see checkpoint.py
              best/           the best checkpoint by best.metric, where it is asked for
              averages/       averages of the weights, stored now and then, where ema.lengths asks for them
              quarantine/     bad samples, as JSON lines
              audit/          every sample seen, where run.audit is on
              export/STEP/    what others open
              lease.json      who trains it now
              result.json     written when the run is finished and registered
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from infra import storage
from infra.errors import BadRequest
from pipelines.training.config import TrainConfig, changes


@dataclass(frozen=True)
class RunFolder:
    """A run's folder by its URL (a local path or s3://)."""

    url: str

    @staticmethod
    def of(config: TrainConfig) -> RunFolder:
        return RunFolder(storage.join(root_of(config), config.run.name))

    def path(self, *parts: str) -> str:
        return storage.join(self.url, *parts)

    @property
    def checkpoints(self) -> str:
        return self.path("checkpoints")

    @property
    def best(self) -> str:
        return self.path("best")

    @property
    def averages(self) -> str:
        return self.path("averages")

    @property
    def inputs(self) -> str:
        return self.path("inputs")

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where it is not there."""
        try:
            return dict(json.loads(storage.read_bytes(self.path(name))))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: dict[str, Any]) -> None:
        storage.write_bytes(self.path(name), (json.dumps(content, indent=2, default=str) + "\n").encode())

    def config(self) -> TrainConfig:
        """The configuration of the run. Raises BadRequest where there is no run."""
        content = self.read("config.json")
        if content is None:
            raise BadRequest(f"{self.url} holds no run (no config.json there)")
        return TrainConfig.model_validate(content)

    def begin(self, config: TrainConfig) -> None:
        """Write the configuration, or check that it is still the same run.

        A run has begun once its inputs are there: until then a command that was wrong can be corrected.

        Raises:
            BadRequest: the run began with another configuration; the message shows the difference.
        """
        resolved = json.loads(config.model_dump_json())
        if different := self._differences(resolved) or []:
            raise BadRequest(
                f"run {config.run.name!r} began with another configuration ({'; '.join(different)}): "
                f"undo that to resume, or start anew with run.name=ANOTHER_NAME"
            )
        self.write("config.json", resolved)

    def began_as(self, config: TrainConfig) -> bool:
        """Whether the run has begun, and is the one that `config` describes."""
        return self._differences(json.loads(config.model_dump_json())) == []

    def _differences(self, resolved: dict[str, Any]) -> list[str] | None:
        """What makes a resolved configuration another run; None where the run has not begun."""
        if not storage.exists(self.path("inputs", "complete")):
            return None
        earlier = self.read("config.json")
        return None if earlier is None else changes(_complete(earlier), resolved)


def root_of(config: TrainConfig) -> str:
    """Where runs are kept, absolute: a Ray job runs in a copy of the sources, and relative paths are lost with it."""
    if config.run.root is None:
        return str(storage.run_root())
    return config.run.root if storage.is_remote(config.run.root) else storage.open_filesystem(config.run.root)[1]


def _complete(earlier: dict[str, Any]) -> dict[str, Any]:
    """An earlier configuration with the defaults of keys that came later; as it is where it is no longer valid."""
    try:
        return dict(json.loads(TrainConfig.model_validate(earlier).model_dump_json()))
    except ValidationError:
        return earlier


def share_index(source: RunFolder, target: RunFolder) -> None:
    """Indexes of shards that cannot be written to are kept in run folders: what one run has made, another one takes."""
    kept = source.path("index")
    if storage.exists(kept) and not storage.exists(target.path("index")):
        with tempfile.TemporaryDirectory() as temporary:
            storage.download_folder(kept, temporary)
            storage.upload_folder(temporary, target.path("index"))
