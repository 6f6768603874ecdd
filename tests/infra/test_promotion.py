"""Champions change one at a time, only to verified versions, and every decision is on record, whatever is killed."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra import promotion, registry, tracking
from infra.errors import BadRequest, RunFailed
from infra.mlflow_store import open_client
from infra.promotion import champion_of, conclude, history, mend, roll_back, verify_version
from infra.registry_lease import RegistryLease
from tests.genmodels import tiny

LINEAGE = {"index_digest": "abc", "seed": 0, "steps": 3, "git_commit": "123"}
CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with three versions of each of some models, as a folder to copy."""
    from genmodels.families import build_objective

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run_id = tracking.start_run(None, "tests", "tiny")
        for number in range(3):
            torch.manual_seed(number)
            export = folder / f"export-{number}"
            build_objective(tiny.gan_config()).export(export)
            registry.register_export(None, run_id, export, "tiny", {}, "seed: 0\n", LINEAGE)
        registry.register_export(None, run_id, folder / "export-0", "unknown", {}, "seed: 0\n", {})
    return folder


@pytest.fixture
def uri(store: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store's URI; aliases, decisions and leases of an earlier test are gone."""
    monkeypatch.setenv("RUN_ROOT", str(store))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = open_client()
    for alias in dict(client.get_registered_model("tiny").aliases):
        client.delete_registered_model_alias("tiny", alias)
    for key in client.get_registered_model("tiny").tags:
        client.delete_registered_model_tag("tiny", key)
    for model in client.search_registered_models("name LIKE 'tiny.lease-%'"):
        client.delete_registered_model(model.name)
    return tracking.tracking_uri()


def aliases(uri: str) -> dict[str, str]:
    return {name: str(version) for name, version in open_client(uri).get_registered_model("tiny").aliases.items()}


def test_champions_follow_each_other_and_a_rollback_goes_back_once(uri: str) -> None:
    for number, event in (("1", "first"), ("2", "better"), ("3", "refused")):
        with RegistryLease(uri, "tiny") as lease:
            promotion.challenge(lease, number)
            assert aliases(uri)["challenger"] == number
            decision = conclude(lease, event, number, f"because of {number}", {"checks": [number]})
        assert decision.promoted == (event != "refused") and "challenger" not in aliases(uri)
    assert aliases(uri) == {"champion": "2", "previous_champion": "1"}
    with RegistryLease(uri, "tiny") as lease:
        assert roll_back(lease).champion == "1"
        assert aliases(uri) == {"champion": "1"}, "before the first champion there was none"
        with pytest.raises(BadRequest, match="no previous champion to go back to"):
            roll_back(lease)
    told = history(uri, "tiny")
    assert [each.event for each in told] == ["first", "better", "refused", "rollback"]
    assert [each.number for each in told] == [1, 2, 3, 4] and {each.state for each in told} == {"done"}
    assert [(each.before, each.champion) for each in told] == [(None, "1"), ("1", "2"), ("2", "2"), ("2", "1")]
    client = open_client(uri)
    assert client.get_model_version("tiny", "3").tags["decision.00000003"] == "refused: because of 3"
    run_id = client.get_model_version("tiny", "3").run_id
    kept = Path(client.download_artifacts(run_id, "promotion/decision-00000003.json"))
    assert json.loads(kept.read_text())["details"] == {"checks": ["3"]}
    (lease,) = client.search_registered_models("name LIKE 'tiny.lease-%'")
    assert lease.name == "tiny.lease-00000004" and "released" in lease.tags, "of all leases the last one stays"
    assert client.get_model_version("tiny", "2").tags["decision.00000004"].startswith("rolled back: rolled back from")


def test_three_champions_and_two_rollbacks(uri: str) -> None:
    with RegistryLease(uri, "tiny") as lease:
        conclude(lease, "first", "1", "")
    for version in ("2", "3"):
        with RegistryLease(uri, "tiny") as lease:
            conclude(lease, "better", version, "")
    for left in ({"champion": "2", "previous_champion": "1"}, {"champion": "1"}):
        with RegistryLease(uri, "tiny") as lease:
            roll_back(lease)
        assert aliases(uri) == left


def test_a_version_is_verified_by_its_files_and_its_lineage(uri: str, store: Path) -> None:
    assert verify_version(uri, "tiny", "2").tags["seed"] == "0"
    with pytest.raises(BadRequest, match=r"models:/unknown/1: its lineage lacks index_digest, seed, steps"):
        verify_version(uri, "unknown", "1")
    with pytest.raises(BadRequest, match="no such version; there are: 1, 2, 3"):
        verify_version(uri, "tiny", "7")
    (weights,) = registry.resolve_model("models:/tiny/2", uri).glob("generator.safetensors")
    kept = weights.read_bytes()
    try:
        save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
        with pytest.raises(BadRequest, match="its files changed since it was registered"):
            verify_version(uri, "tiny", "2")
        with RegistryLease(uri, "tiny") as lease:
            conclude(lease, "first", "1", "")
        with RegistryLease(uri, "tiny") as lease:
            open_client(uri).set_registered_model_alias("tiny", "previous_champion", "2")
            with pytest.raises(BadRequest, match="its files changed"):
                roll_back(lease)
        assert champion_of(uri, "tiny") == "1"
        shutil.rmtree(weights.parent)
        with pytest.raises(BadRequest, match=r"files are not at|its files|holds no model"):
            verify_version(uri, "tiny", "2")
    finally:
        shutil.copytree(store / "export-1", weights.parent, dirs_exist_ok=True)
        weights.write_bytes(kept)
    with pytest.raises(BadRequest, match="there is no registered model 'nothing'"):
        champion_of(uri, "nothing")


def _promote(uri: str, version: str, together: Any, results: Any) -> None:
    open_client(uri)
    together.wait()
    try:
        with RegistryLease(uri, "tiny") as lease:
            time.sleep(3)
            conclude(lease, "better", version, "")
        results.put((version, "won"))
    except BadRequest as error:
        results.put((version, str(error)))


@pytest.mark.slow
def test_of_two_promotions_at_once_one_wins_and_the_other_says_so(uri: str) -> None:
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(3), context.Queue()
    arguments = [(uri, version, together, results) for version in ("1", "2", "3")]
    processes = [context.Process(target=_promote, args=each) for each in arguments]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    (won,) = [version for version, told in found.items() if told == "won"]
    assert aliases(uri) == {"champion": won}
    assert all("tiny is being promoted by process" in told for version, told in found.items() if version != won)
    assert [each.version for each in history(uri, "tiny")] == [won]


def test_a_claim_on_what_was_read_too_long_ago_gives_way(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others came and went between what it read and what it created: it may not have a number of before."""
    for _ in range(3):
        with RegistryLease(uri, "tiny"):
            continue
    slow = RegistryLease(uri, "tiny")
    newest, read = slow._newest, iter([1])
    monkeypatch.setattr(slow, "_newest", lambda client: next(read, None) or newest(client))
    with slow:
        assert slow.number == 4
        names = {model.name for model in open_client(uri).search_registered_models("name LIKE 'tiny.lease-%'")}
        assert names == {"tiny.lease-00000003", "tiny.lease-00000004"}


def test_the_leases_of_other_models_are_not_its_own(uri: str) -> None:
    client = open_client(uri)
    for name in ("TINY.lease-00000041", "t_ny.lease-00000042"):
        client.create_registered_model(name, tags={"released": "yes"})
    try:
        with RegistryLease(uri, "tiny") as lease:
            assert lease.number == 1
        client.create_registered_model("t_ny")
        with RegistryLease(uri, "t_ny") as lease:
            assert lease.number == 43
    finally:
        for model in client.search_registered_models():
            if model.name.upper().startswith(("TINY.", "T_NY")):
                client.delete_registered_model(model.name)


_HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from infra.registry_lease import RegistryLease
with RegistryLease(sys.argv[2], "tiny"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_promotion_holds_is_taken_over_at_once(uri: str) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(CHECKOUT), uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(BadRequest, match=f"tiny is being promoted by process {holder.pid} on "):
        RegistryLease(uri, "tiny").__enter__()
    holder.send_signal(signal.SIGKILL)
    time.sleep(0.5)  # nobody has waited for it: it is a zombie
    with RegistryLease(uri, "tiny") as lease:
        assert lease.number == 2
    holder.wait()
    with RegistryLease(uri, "tiny") as lease:
        assert lease.number == 3


def test_who_was_cut_off_for_so_long_that_another_took_over_moves_nothing(uri: str) -> None:
    client = open_client(uri)
    slow = RegistryLease(uri, "tiny")
    with slow:
        # As from another machine, and not renewed for a minute.
        client.set_registered_model_tag("tiny.lease-00000001", "host", "elsewhere")
        with pytest.raises(BadRequest, match="is being promoted"):
            RegistryLease(uri, "tiny").__enter__()
        client.set_registered_model_tag("tiny.lease-00000001", "renewed", str(time.time() - 61))
        with RegistryLease(uri, "tiny") as fast:
            assert fast.number == 2
            with pytest.raises(RunFailed, match="another promotion of tiny took over"):
                conclude(slow, "first", "1", "")
            conclude(fast, "first", "2", "")
        with pytest.raises(RunFailed, match="took over"):
            conclude(slow, "first", "1", "")
    assert aliases(uri) == {"champion": "2"} and [each.version for each in history(uri, "tiny")] == ["2"]


class _Killed(BaseException):
    """What a process that is killed does not get to handle."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["promotion", "rollback"])
@pytest.mark.parametrize("calls", range(10))  # after the last of them it is finished
def test_killed_anywhere_there_is_a_verified_champion_and_the_next_one_finishes_the_record(
    calls: int, kind: str, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write to the registry is one after which the promotion may be killed."""
    from mlflow.tracking import MlflowClient

    for version, event in (("1", "first"), ("2", "better")):
        with RegistryLease(uri, "tiny") as lease:
            conclude(lease, event, version, "")
    lease = RegistryLease(uri, "tiny")
    lease.__enter__()
    lease._ended.set()  # its renewals would count too
    left = calls
    writes = ("set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias")
    for name in (*writes, "set_model_version_tag", "log_dict"):
        whole = getattr(MlflowClient, name)

        def cut(self: Any, *args: Any, whole: Any = whole, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise _Killed
            left -= 1
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, cut)
    finished = True
    try:
        if kind == "promotion":
            promotion.challenge(lease, "3")
            conclude(lease, "better", "3", "")
        else:
            roll_back(lease)
    except _Killed:
        finished = False
    monkeypatch.undo()
    monkeypatch.setenv("RUN_ROOT", str(Path(uri.removeprefix("sqlite:///")).parent))
    client = open_client(uri)
    client.set_registered_model_tag("tiny.lease-00000003", "started", "0.0")  # the process is gone
    champion = champion_of(uri, "tiny")
    assert champion in ("2", "3" if kind == "promotion" else "1") and (champion != "2" or not finished)
    verify_version(uri, "tiny", champion or "")
    with RegistryLease(uri, "tiny") as following:
        mended = mend(following)
        assert following.number == 4 and not (finished and mended)
        told = history(uri, "tiny")
        assert {each.state for each in told} == {"done"}
        before = {"1": None, "2": "1", "3": "2"}[champion or ""]
        assert aliases(uri).get("previous_champion") == before
        if len(told) == 3:
            assert told[-1].champion == champion and told[-1].promoted == (champion == "3")
            version = client.get_model_version("tiny", told[-1].version)
            assert version.tags["decision.00000003"].startswith(told[-1].event)
            assert client.list_artifacts(version.run_id, "promotion")
        promotion.withdraw(following)
    assert set(aliases(uri)) <= {"champion", "previous_champion"}
    if before is not None:
        with RegistryLease(uri, "tiny") as following:
            assert roll_back(following).champion == before
