"""`promote.py` on registered models through Ray: promoted, refused, rolled back, and what it leaves on record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from infra import registry
from infra.errors import BadRequest
from infra.mlflow_store import open_client
from infra.promotion import conclude
from infra.registry_lease import RegistryLease
from infra.storage import download_folder
from pipelines import promote as script
from pipelines.promotion.command import argument_parser, promote
from pipelines.training.run_folder import RunFolder
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow
COUNT = 40
SMALL = ["--count", str(COUNT), "--num-steps", "2", "--features", "digits", "--actors", "1"]
NEARER = ["improve=[frechet_distance]", "share_of_real={}", "not_worse=[]", "copies=false", "slice_loss=1"]


@pytest.fixture(scope="module")
def versions(alone: RunFolder, run_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Versions of `promo`: 1 all noise, 2 what a run learnt, 3 noise again."""
    described, result = alone.read("run.json") or {}, alone.read("result.json") or {}
    lineage = {"index_digest": result["index_digest"], "git_commit": "x", "seed": 0, "steps": small_run.STEPS}
    config = yaml.safe_dump(json.loads(alone.config().model_dump_json()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_ROOT", str(run_root))
        for number, noise in enumerate((1.0, 0.0, 2.0)):
            folder = tmp_path_factory.mktemp("export")
            download_folder(result["export"], folder)
            (weights,) = folder.glob("unet/*.safetensors")
            torch.manual_seed(number)
            tensors = {name: value + noise * torch.randn(value.shape) for name, value in load_file(weights).items()}
            save_file(tensors, weights)
            registry.register_export(
                described["tracking_uri"], described["mlflow_run_id"], folder, "promo", {}, config, lineage
            )
    return str(described["tracking_uri"])


@pytest.fixture
def run(versions: str, shards: str, run_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(model: str, *arguments: str) -> dict[str, Any]:
        files = ["--data", shards, "--tracking-uri", versions, "--summary", str(tmp_path / "summary.json")]
        summary = promote(argument_parser().parse_intermixed_args([model, *arguments, *SMALL, *files]))
        assert json.loads((tmp_path / "summary.json").read_text())["model"] == "promo"
        return summary

    return call


def test_a_life_of_champions(run: Any, versions: str, capsys: pytest.CaptureFixture[str]) -> None:
    def aliases() -> dict[str, str]:
        return {k: str(v) for k, v in open_client(versions).get_registered_model("promo").aliases.items()}

    def figures_of_1() -> dict[str, str]:
        tags = open_client(versions).get_model_version("promo", "1").tags
        return {name: text for name, text in tags.items() if name.startswith("evaluation.")}

    refused = run("models:/promo/1")  # noise reaches no threshold
    assert refused["outcome"] == "refused" and refused["champion"] is None and not aliases()
    assert "of real" in refused["reason"]
    first = run("models:/promo/1", *NEARER)
    assert (first["outcome"], first["event"], first["promoted"], first["champion"]) == ("promoted", "first", True, "1")
    again = run("models:/promo/1", *NEARER)
    assert again["outcome"] == "already champion"
    alone = figures_of_1()
    better = run("models:/promo/2", *NEARER)
    assert len(alone) > 5 and figures_of_1() == alone  # measured again, beside version 2, by the same actors
    assert (better["event"], better["champion"], better["before"]) == ("better", "2", "1")
    assert "frechet_distance" in better["reason"] and better["candidate"]["figures"]
    worse = run("models:/promo", "--dry-run", *NEARER)  # the newest version: 3
    assert (worse["version"], worse["outcome"], worse["champion"]) == ("3", "would be refused", "2")
    assert aliases() == {"champion": "2", "previous_champion": "1"}
    back = run("models:/promo", "--rollback")
    assert back["outcome"] == "rolled back" and aliases() == {"champion": "1"}
    capsys.readouterr()
    told = run("models:/promo", "--history")["decisions"]
    assert [each["event"] for each in told] == ["refused", "first", "better", "rollback"]
    printed = capsys.readouterr().out
    assert "promo: champion is version 1" in printed and "1 → 2" in printed


def test_a_rollback_that_was_cut_off_and_is_typed_again_goes_back_once(
    run: Any, versions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was killed after the alias moved: what it left to do is done, and the champion before that one stays."""
    from mlflow.tracking import MlflowClient

    def aliases() -> dict[str, str]:
        return {k: str(v) for k, v in open_client(versions).get_registered_model("promo").aliases.items()}

    for version, event in (("1", "first"), ("2", "better"), ("3", "better")):
        with RegistryLease(versions, "promo") as lease:
            conclude(lease, event, version, "")
    assert aliases() == {"champion": "3", "previous_champion": "2"}
    whole = MlflowClient.set_registered_model_alias

    def cut(self: Any, *arguments: Any) -> None:
        whole(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "set_registered_model_alias", cut)
        run("models:/promo", "--rollback")
    again = run("models:/promo", "--rollback")
    assert (again["outcome"], again["before"], again["champion"]) == ("rolled back", "3", "2")
    assert "was cut off before it was recorded" in capsys.readouterr().out
    assert aliases() == {"champion": "2", "previous_champion": "1"}
    assert run("models:/promo", "--rollback")["champion"] == "1"


def test_somebody_else_promotes(run: Any, versions: str) -> None:
    with RegistryLease(versions, "promo"), pytest.raises(BadRequest, match="promo is being promoted by process"):
        run("models:/promo/2")
    with pytest.raises(BadRequest, match="no registered model 'nobody'"):
        run("models:/nobody/2")
    with pytest.raises(BadRequest, match="give one of them"):
        run("models:/promo", "--rollback", "--history")


def test_help_names_every_gate_without_loading_torch() -> None:
    code = (
        f"import runpy, sys\nsys.argv = [{script.__file__!r}, '--help']\n"
        f"try: runpy.run_path({script.__file__!r}, run_name='__main__')\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "improve_by" in done.stdout and "--rollback" in done.stdout and done.stdout.endswith("False\n")
