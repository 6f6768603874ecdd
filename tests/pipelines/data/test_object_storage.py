"""The same shards from an S3 server: written, indexed, read; and a bucket without access."""

import pytest

from infra.errors import BadRequest
from pipelines.data.index import load_index
from pipelines.data.order import DataOrder
from pipelines.data.quarantine import Quarantine, read_quarantine
from pipelines.data.read import read_steps
from pipelines.data.spec import SampleSpec
from pipelines.data.write import ShardWriter
from tests.pipelines.data.shards import encode, numbered_image, write_shards
from tests.servers import rclone_s3


def test_object_storage_gives_the_same_batches_as_a_folder(tmp_path, monkeypatch):
    local = write_shards(tmp_path / "local", samples=30, per_shard=12, chunk_samples=4)
    with rclone_s3(tmp_path / "server") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # This server answers a range with the checksum of the whole object, which the client would hold against it.
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        with ShardWriter("s3://data/set/train", 12, chunk_samples=4) as writer:
            for number in range(30):
                members = {"png": encode(numbered_image(number)), "txt": f"number {number}".encode()}
                writer.write(f"{number:06d}", members)
        remote = load_index("s3://data/set/train", build=False)
        assert remote.digest == local.digest
        assert load_index("s3://data/set/train/0000[01].tar", progress=False).samples == 24
        tables = [
            [table.to_pylist() for table in read_steps(DataOrder(index, 0, 2, 6, 9), SampleSpec(8), 1, 2, 0, 5)]
            for index in (local, remote)
        ]
        assert tables[0] == tables[1]

        quarantine = Quarantine("s3://data/run/quarantine", 0)
        quarantine.add(["a.tar/x"], ["image: missing"], 4)
        assert read_quarantine("s3://data/run/quarantine")[0]["key"] == "a.tar/x"

        with pytest.raises(BadRequest, match="no shard matches s3://data/elsewhere"):
            load_index("s3://data/elsewhere")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(BadRequest, match="bucket data"):
            load_index("s3://data/set/train")
