"""Files in local folders and in object storage behind one set of functions.

A URL is a local path (made absolute, `~` expanded) or `s3://bucket/key`. S3 is reached through s3fs everywhere, since
pyarrow's own client fails against some servers; endpoint, keys and region come from the standard environment
variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION) or, where these
are absent, from whatever else the AWS SDK finds (a profile, the machine's role).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from fsspec.implementations.local import LocalFileSystem

from infra.errors import BadRequest

ERRORS = (OSError, BotoCoreError, ClientError, aiohttp.ClientError)
"""What storage raises when it does not answer as it should: s3fs makes OSErrors of some, and lets others through."""
_FILES_AT_ONCE = 64  # open files and sockets per call, however large the folder


def is_remote(url: str | os.PathLike[str]) -> bool:
    """True for `s3://…`, False for a local path. Raises BadRequest for another scheme."""
    scheme, separator, _ = str(url).partition("://")
    if not separator or scheme == "file":
        return False
    if scheme != "s3":
        raise BadRequest(f"{url}: storage scheme {scheme}:// is not known; give a local path or s3://bucket/key")
    return True


def run_root() -> Path:
    """The local folder of runs, the MLflow store and downloads: `RUN_ROOT`, else `~/genmodels-runs`; absolute.

    Raises BadRequest where RUN_ROOT is a URL: SQLite and downloads need a local folder.
    """
    root = os.environ.get("RUN_ROOT") or "~/genmodels-runs"
    if is_remote(root):
        raise BadRequest(f"RUN_ROOT={root}: must be a local folder; keep runs in object storage with run.root={root}")
    return Path(root).expanduser().absolute()


def open_filesystem(url: str | os.PathLike[str]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of `url`, and the path within it. Nothing is contacted yet."""
    keys = {
        "key": os.environ.get("AWS_ACCESS_KEY_ID"),
        "secret": os.environ.get("AWS_SECRET_ACCESS_KEY"),
        "token": os.environ.get("AWS_SESSION_TOKEN"),
    }
    return _open(url, keys)


def _open(url: str | os.PathLike[str], keys: dict[str, str | None]) -> tuple[fsspec.AbstractFileSystem, str]:
    text = str(url)
    if not is_remote(text):
        return LocalFileSystem(auto_mkdir=True), os.path.abspath(os.path.expanduser(text.removeprefix("file://")))
    import s3fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    filesystem = s3fs.S3FileSystem(
        endpoint_url=endpoint,
        **keys,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            # Some servers answer a range with the checksum of the whole object; what is read here is checked against
            # the index or the manifest anyway.
            "response_checksum_validation": "when_required",
            # Servers other than AWS rarely have a DNS name for each bucket.
            **({"s3": {"addressing_style": "path"}} if endpoint else {}),
        },
        use_listings_cache=False,  # another process writes: a cached listing would hide its newest checkpoint
    )
    path = text.removeprefix("s3://").rstrip("/")
    if not path:
        raise BadRequest(f"{url}: no bucket named; give s3://bucket/key")
    return filesystem, path


def join(url: str | os.PathLike[str], *parts: str) -> str:
    """`url` with `parts` appended, a slash between each."""
    return "/".join([str(url).rstrip("/"), *(part.strip("/") for part in parts)])


def exists(url: str) -> bool:
    """True where `url` is a file or a folder (on S3: a prefix that holds something)."""
    filesystem, path = open_filesystem(url)
    return filesystem.exists(path)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    filesystem, path = open_filesystem(url)
    return filesystem.cat_file(path)


@contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A temporary name beside local `path`; renamed to it, after an fsync, when the block ends well."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself is data of the folder
    finally:
        os.close(descriptor)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file, complete or not at all; parent folders are made."""
    filesystem, path = open_filesystem(url)
    if is_remote(url):
        filesystem.pipe_file(path, data)
        return
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def _relative_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def upload_folder(local: str | os.PathLike[str], url: str) -> list[str]:
    """Copy every file under `local` to `url`, each one complete or absent; returns their relative names, sorted."""
    source = Path(local)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder")
    names = _relative_files(source)
    filesystem, path = open_filesystem(url)
    if is_remote(url):
        sources = [str(source / name) for name in names]
        filesystem.put(sources, [f"{path}/{name}" for name in names], batch_size=_FILES_AT_ONCE)
    else:
        for name in names:
            with _replacing(os.path.join(path, name)) as temporary:
                shutil.copyfile(source / name, temporary)
    return names


def download_folder(url: str, local: str | os.PathLike[str]) -> list[str]:
    """Copy every file under `url` to `local`, each one complete or absent; returns their relative names, sorted.

    Raises FileNotFoundError where `url` holds no file.
    """
    filesystem, path = open_filesystem(url)
    target = Path(local).absolute()
    names = sorted(os.path.relpath(found, path) for found in filesystem.find(path))
    if not names or names == ["."]:
        raise FileNotFoundError(f"{url} is not a folder that holds files")
    for first in range(0, len(names), _FILES_AT_ONCE):
        group = names[first : first + _FILES_AT_ONCE]
        temporary = {name: target / f"{name}.{uuid.uuid4().hex}.tmp" for name in group}
        try:
            for partial in temporary.values():
                partial.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get([f"{path}/{name}" for name in group], [str(temporary[name]) for name in group])
            for name in group:
                os.replace(temporary[name], target / name)
        finally:
            for partial in temporary.values():
                partial.unlink(missing_ok=True)
    return names


def list_folders(url: str) -> list[str]:
    """Names of the folders directly under `url`, sorted; empty where `url` does not exist."""
    filesystem, path = open_filesystem(url)
    try:
        entries = filesystem.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = (entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory")
    return sorted(names)


def remove(url: str) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is no error."""
    filesystem, path = open_filesystem(url)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def check_access(url: str, write: bool = False) -> None:
    """Raise BadRequest, in one line that says what to do, where `url` cannot be listed (or written, with `write`).

    A prefix that holds nothing passes. Writing is tried with an empty file, which is removed again.
    """
    if not is_remote(url):
        _check_local(url, write)
        return
    filesystem: Any
    filesystem, path = open_filesystem(url)
    bucket, _, prefix = path.partition("/")
    endpoint = filesystem.endpoint_url or "AWS"
    try:
        filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        if write:
            probe = f"{path}/.access-{uuid.uuid4().hex}"
            filesystem.pipe_file(probe, b"")
            filesystem.rm_file(probe)
    except NoCredentialsError as error:
        raise BadRequest(f"bucket {bucket}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except PermissionError as error:
        raise BadRequest(
            f"bucket {bucket}: access denied at {endpoint}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            f"of an account that may {'write' if write else 'read'} it"
        ) from error
    except FileNotFoundError as error:
        raise BadRequest(
            f"no bucket {bucket} at {endpoint}; create it, or set AWS_ENDPOINT_URL to the server that holds it"
        ) from error
    except ERRORS as error:
        reason = " ".join(str(error).split())
        raise BadRequest(
            f"bucket {bucket}: {endpoint} does not answer as S3 ({reason}); check AWS_ENDPOINT_URL"
        ) from error


def _check_local(url: str, write: bool) -> None:
    path = Path(open_filesystem(url)[1])
    try:
        if path.is_dir():
            os.scandir(path).close()
        if write:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".access-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
    except OSError as error:
        verb = "written" if write else "read"
        raise BadRequest(f"{path}: cannot be {verb} ({error.strerror}); give a folder that you may use") from error


def ray_filesystem(url: str) -> tuple[Any, str]:
    """(pyarrow filesystem, path within it) for Ray Train's `RunConfig(storage_filesystem=…, storage_path=…)`.

    Ray pickles it, also into files: it holds no keys, which every node finds in its own environment.
    """
    from pyarrow import fs

    filesystem, path = _open(url, {})
    if not is_remote(url):
        return fs.LocalFileSystem(), path
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path
