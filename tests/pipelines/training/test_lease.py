"""One launch at a time: who comes second is refused, who lost the lease knows, who died is forgotten."""

from __future__ import annotations

import threading
import time

import psutil
import pytest

from infra import storage
from infra.errors import BadRequest, RunFailed
from pipelines.training import lease
from pipelines.training.lease import Lease
from pipelines.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path / "run"))


def test_the_second_is_refused_and_a_later_one_is_not(folder):
    with Lease(folder), pytest.raises(BadRequest, match="is being trained by process"):
        Lease(folder).__enter__()
    assert folder.read("lease.json") is None
    with Lease(folder):
        pass


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({"host": "another"}, True),
        ({"host": "another", "renewed": 0}, False),  # not renewed for long
        ({"pid": psutil.Process().pid, "started": 0}, False),  # another process had this number
    ],
)
def test_who_died_is_forgotten(folder, change, held):
    owner = Lease(folder).owner
    folder.write("lease.json", {**owner, "token": "theirs", "renewed": time.time(), **change})
    if held:
        with pytest.raises(BadRequest, match="on another"):
            Lease(folder).__enter__()
    else:
        with Lease(folder):
            assert folder.read("lease.json")["token"] != "theirs"


def test_of_many_at_once_one_holds_it(folder):
    barrier, held, refused = threading.Barrier(8), [], []

    def launch():
        own = Lease(folder)
        barrier.wait()
        try:
            held.append(own.__enter__())
        except BadRequest as error:
            refused.append(error)

    threads = [threading.Thread(target=launch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].__exit__()


def test_storage_may_fail_for_a_while_and_a_lost_lease_is_known(folder, monkeypatch, capfd):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    failures = iter([OSError("the server is away")] * 3)
    write = storage.write_bytes

    def write_bytes(url, data):
        for failure in failures:
            raise failure
        write(url, data)

    with Lease(folder) as own:
        monkeypatch.setattr(storage, "write_bytes", write_bytes)
        renewed = folder.read("lease.json")["renewed"]
        deadline = time.time() + 5
        while folder.read("lease.json")["renewed"] == renewed and time.time() < deadline:
            time.sleep(0.01)
        assert folder.read("lease.json")["renewed"] > renewed
        own.check()
        with own._one_at_a_time():
            write(folder.path("lease.json"), b'{"token": "theirs", "host": "another", "pid": 1, "renewed": 9e99}')
        own._thread.join(timeout=5)
        with pytest.raises(RunFailed, match="another launch of this run took over"):
            own.check()
    assert "could not be renewed (the server is away)" in capfd.readouterr().err
    assert folder.read("lease.json")["token"] == "theirs", "a lease that is another one's is left alone"
