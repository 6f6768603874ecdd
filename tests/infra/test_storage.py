"""Storage on a local folder and on two S3 servers: round trips, atomic writes, and what a user reads on failure."""

from __future__ import annotations

import os
import pickle

import pytest

from infra import storage
from infra.errors import BadRequest
from tests.servers import AWS_VARIABLES, free_port, moto_s3, rclone_s3


@pytest.fixture(scope="module", params=["local", "rclone", "moto"])
def root(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name in AWS_VARIABLES:
            patch.delenv(name, raising=False)
        if request.param == "local":
            yield str(folder)
            return
        with (rclone_s3 if request.param == "rclone" else moto_s3)(folder) as environment:
            for name, value in environment.items():
                patch.setenv(name, value)
            yield "s3://data"


def test_bytes_round_trip(root):
    url = storage.join(root, "a", "b", "value.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"one")
    assert storage.read_bytes(url) == b"one"
    storage.write_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert storage.exists(url) and storage.exists(storage.join(root, "a"))
    storage.remove(storage.join(root, "a"))
    assert not storage.exists(url)
    storage.remove(url)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)


def test_folder_round_trip(root, tmp_path):
    files = {"top.txt": b"1", "deep/er/x.bin": os.urandom(70_000), "deep/y.txt": b""}
    files |= {f"n{i}": b"n" for i in range(70)}
    for name, data in files.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(data)
    url = storage.join(root, "folders", "first")
    assert storage.upload_folder(tmp_path / "from", url) == sorted(files)
    assert storage.download_folder(url, tmp_path / "to") == sorted(files)
    found = [path for path in (tmp_path / "to").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "to").as_posix(): path.read_bytes() for path in found} == files


def test_listings_show_what_was_just_written(root):
    base = storage.join(root, "listed")
    assert storage.list_folders(base) == []
    for name in ("step-2", "step-1"):
        storage.write_bytes(storage.join(base, name, "manifest.json"), b"{}")
    storage.write_bytes(storage.join(base, "a-file"), b"")
    assert storage.list_folders(base) == ["step-1", "step-2"]
    storage.remove(storage.join(base, "step-1"))
    assert storage.list_folders(base) == ["step-2"]


def test_absent_folder_is_not_found(root, tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.download_folder(storage.join(root, "nowhere"), tmp_path)


def test_access_is_granted(root):
    storage.check_access(root)
    storage.check_access(storage.join(root, "empty-prefix"), write=True)


def test_ray_filesystem_writes_nested_and_pickles(root):
    from pyarrow import fs

    filesystem, path = storage.ray_filesystem(storage.join(root, "ray"))
    filesystem = pickle.loads(pickle.dumps(filesystem))
    filesystem.create_dir(f"{path}/run/checkpoint", recursive=True)
    with filesystem.open_output_stream(f"{path}/run/checkpoint/part") as file:
        file.write(b"part")
    assert filesystem.get_file_info(f"{path}/run/checkpoint/part").type == fs.FileType.File
    assert storage.read_bytes(storage.join(root, "ray/run/checkpoint/part")) == b"part"


@pytest.mark.parametrize("root", ["rclone", "moto"], indirect=True)
def test_missing_bucket_is_one_line(root):
    with pytest.raises(BadRequest, match="no bucket absent") as caught:
        storage.check_access("s3://absent/x")
    assert "\n" not in str(caught.value)


def test_wrong_keys_are_one_line(tmp_path, monkeypatch):
    with rclone_s3(tmp_path) as environment:
        for name, value in {**environment, "AWS_SECRET_ACCESS_KEY": "wrong"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(BadRequest, match=r"bucket data: access denied.*AWS_ACCESS_KEY_ID") as caught:
            storage.check_access("s3://data/x")
        assert "\n" not in str(caught.value)


def test_silent_server_is_one_line(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(BadRequest, match="check AWS_ENDPOINT_URL"):
        storage.check_access("s3://data/x")


def test_unknown_scheme_and_empty_bucket():
    with pytest.raises(BadRequest, match="gs://"):
        storage.open_filesystem("gs://bucket/key")
    with pytest.raises(BadRequest, match="no bucket"):
        storage.open_filesystem("s3://")


def test_local_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "value"
    storage.write_bytes(str(target), b"old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["value"]


def test_local_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="cannot be written"):
        storage.check_access(str(tmp_path / "file" / "below"), write=True)


def test_run_root_is_absolute(monkeypatch):
    monkeypatch.setenv("RUN_ROOT", "runs")
    assert storage.run_root().is_absolute()
    monkeypatch.setenv("RUN_ROOT", "s3://data/runs")
    with pytest.raises(BadRequest, match=r"run\.root=s3://data/runs"):
        storage.run_root()
    monkeypatch.delenv("RUN_ROOT")
    assert storage.run_root().name == "genmodels-runs"
