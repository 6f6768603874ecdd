"""What a training command answers to a request that cannot be carried out: exit 2 and one line, before Ray starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import BadRequest, main_exit
from pipelines import prepare_shards
from pipelines.training import cluster, inputs, launch
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.command import run
from pipelines.training.config import load_config
from pipelines.training.run_folder import RunFolder
from tests.pipelines.data.shards import write_shards

CHECKOUT = Path(__file__).resolve().parents[3]
Refusal = Callable[..., str]


def _data(folder: Path) -> list[str]:
    """Overrides that make a demo preset a small run on these shards, which all tests share with an MLflow store."""
    return [
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"data.url={folder}",
        "data.validation_url=null",
        "data.demo=null",
        "run.name=refused",
        "workers.count=1",
        "tracking.register_as=null",
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, samples=12, per_shard=12)
    return folder


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_ROOT", str(tmp_path / "root"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def no_ray(*_: object) -> None:
        raise AssertionError("the request reached Ray")

    monkeypatch.setattr(cluster, "connect", no_ray)
    return tmp_path / "root"


@pytest.fixture
def ends(environment, monkeypatch, capsys):
    """Runs a training command in this process: exit code, standard output, standard error."""

    def command(*arguments: object, preset: str = "ldm_demo", kind: str = "latent_diffusion") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        code = 0
        try:
            main_exit(lambda: run("Train.", preset, kind))
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def refusal(ends) -> Refusal:
    """The one line of a refused command."""

    def command(*arguments: object, **options: str) -> str:
        code, _, error = ends(*arguments, **options)
        assert code == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error.removeprefix("error: ").rstrip("\n")

    return command


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run.stepz=3"], ["unknown key run.stepz", "did you mean steps?"]),
        (["run.steps=many"], ["run.steps: ", "'many'"]),
        (["ldm_dmeo"], ["no preset 'ldm_dmeo'", "ldm_demo", "autoencoder_demo"]),
        (["autoencoder_demo"], ["objective.kind=autoencoder", "latent_diffusion"]),
        (["data.url=/nowhere/at/all", "data.demo=null"], ["no shard matches /nowhere/at/all"]),
        (["data.url=/nowhere/*.tar", "data.demo=null"], ["no shard matches /nowhere/*.tar"]),
        (["data.url=pipe:cat x.tar", "data.demo=null"], ["commands are not run", "folder or s3:// URL"]),
        (["data.url=/x/{00..10}.tar", "data.demo=null"], ["braces are not expanded"]),
        (["workers.count=3"], ["workers.count=3 does not divide data.lanes=4", "[1, 2, 4]"]),
        (["data.global_batch_size=30"], ["data.global_batch_size=30", "data.lanes=4"]),
        (["data.micro_batch=5", "data.global_batch_size=64", "workers.count=2"], ["data.micro_batch=5", "32"]),
        (["workers.count=2", "workers.local_cpus=2"], ["need 4 CPUs", "Ray has 2", "workers.local_cpus"]),
        (["data.caption=null"], ["data.caption is null"]),
        (["run.name="], ["run.name: "]),
        (["run.name=.."], ["run.name: '..'"]),
        (["run.name=a/b"], ["run.name: 'a/b'"]),
        (["run.root=/proc/nowhere"], ["/proc/nowhere: cannot be written"]),
        (["run.root=gs://bucket/runs"], ["run.root: ", "gs:// is not known"]),
        (["--summary", "/proc"], ["--summary /proc cannot be written"]),
        (["--summary", "/proc/nowhere/out.json"], ["--summary /proc/nowhere/out.json cannot be written"]),
    ],
)
def test_bad_requests(refusal, environment, arguments, parts):
    line = refusal(*arguments)
    assert all(part in line for part in parts), line
    assert not (environment / "ldm-demo").exists(), "a refused request leaves no run behind"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data.lanes=12", "data.global_batch_size=24"], []),  # a sound request, so that the others fail for one reason
        (["data.validation_url=/nowhere"], ["no shard matches /nowhere"]),
        (["tracking.uri=http://127.0.0.1:1"], ["no MLflow server answers at http://127.0.0.1:1"]),
        (["tracking.uri=file:///tmp/mlruns"], ["MLflow no longer writes plain folders"]),
        (["run.init_from=/nowhere"], ["run.init_from: ", "/nowhere: no such folder"]),
        (["run.init_from=models:/absent/1"], ["run.init_from: ", "no registered model 'absent'"]),
        (["objective.autoencoder=models:/absent@champion"], ["objective.autoencoder: ", "'absent'", "there are: none"]),
        (["objective.autoencoder=preset:nowhere"], ["there is no preset 'nowhere'"]),
        (["objective.text_encoder.path=preset:nowhere"], ["there is no preset 'nowhere'"]),
        (["objective.text_encoder.path=models:/absent/1"], ["objective.text_encoder.path: ", "model 'absent'"]),
        (
            ["objective.text_encoder={kind: pretrained, path: /nowhere}", "objective.autoencoder=null"],
            ["objective.text_encoder.path=/nowhere"],
        ),
    ],
)
def test_bad_references(refusal, ends, shards, arguments, parts):
    if not parts:
        assert ends(*_data(shards), *arguments, "objective.autoencoder=null", "--dry-run")[0] == 0
        return
    line = refusal(*_data(shards), *arguments)
    assert all(part in line for part in parts), line


def test_what_is_wrong_is_said_before_an_autoencoder_is_trained(refusal, shards):
    line = refusal(*_data(shards), "objective.autoencoder=preset:autoencoder_demo", "run.init_from=/nowhere")
    assert line.startswith("run.init_from: ")


def test_a_model_of_another_kind_is_refused_before_a_preset_is_trained(refusal, shards, tmp_path, monkeypatch):
    (tmp_path / "ae").mkdir()
    (tmp_path / "ae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "ae" / "diffusion_pytorch_model.safetensors").touch()
    monkeypatch.setattr(inputs, "resolve_reference", lambda *_, **__: tmp_path / "ae")
    line = refusal(
        *_data(shards),
        "objective.text_encoder.path=models:/ae/1",
        "objective.autoencoder=preset:autoencoder_demo",
    )
    assert line.startswith("objective.text_encoder.path=models:/ae/1: ")


def test_a_preset_that_is_trained_first_finds_room_for_what_follows(environment, shards, monkeypatch):
    asked = []

    def stand_in(config):
        asked.append(config)
        return {"export": "/nowhere"}

    train = launch.train
    monkeypatch.setattr(launch, "train", stand_in)
    places = [f"run.root={environment}/runs", f"tracking.uri=sqlite:///{environment}/elsewhere.db"]
    four_workers = load_config("ldm_demo", [*_data(shards), "workers.count=4", *places])
    with pytest.raises(BadRequest, match="/nowhere: no such folder"):
        train(four_workers)
    (first,) = asked
    assert (first.run.name, first.run.root) == ("clip-demo", f"{environment}/runs")
    assert first.tracking.uri == four_workers.tracking.uri
    # Ray is started once, by the first training.
    cluster.check_room(four_workers, {"CPU": float(cluster.local_cpus(first)), "GPU": 0.0})


@pytest.mark.parametrize(
    ("result", "same"),
    [
        ({"model_uri": "models:/name/3", "checkpoint": "last"}, True),
        ({"model_uri": "models:/name/3", "checkpoint": "an earlier one"}, False),
        ({"model_uri": "models:/another/3", "checkpoint": "last"}, False),
        ({"model_uri": None, "checkpoint": "last"}, False),
    ],
)
def test_what_was_published_is_the_last_checkpoint_under_the_name_that_is_asked_for(environment, result, same):
    config = load_config("autoencoder_demo", ["tracking.register_as=name"])
    assert launch._is_of(result, Checkpoint("last", {}), config) is same


def test_a_refused_request_can_be_corrected(refusal, ends, shards):
    """The first attempt chose another configuration, but began nothing."""
    refusal(*_data(shards), "objective.autoencoder=/nowhere")
    line = refusal(*_data(shards), "objective.autoencoder=/elsewhere")
    assert "/elsewhere: no such folder" in line


def test_a_run_that_began_shows_what_changed(refusal, shards, environment):
    config = load_config("autoencoder_demo", _data(shards))
    folder = RunFolder.of(config)
    folder.begin(config)
    (environment / "refused" / "inputs").mkdir()
    (environment / "refused" / "inputs" / "complete").touch()
    line = refusal(
        *_data(shards), "data.global_batch_size=48", "run.steps=3", preset="autoencoder_demo", kind="autoencoder"
    )
    assert f"data.global_batch_size: {config.data.global_batch_size} → 48" in line and "run.name=ANOTHER_NAME" in line
    assert "run.steps" not in line
    assert folder.config() == config, "the run keeps the configuration that it began with"


def test_a_folder_that_may_not_be_read(refusal, shards, monkeypatch):
    scandir = os.scandir

    def denied(path: str | Path = ".") -> object:
        if str(path) == str(shards):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # the superuser may read everything
    line = refusal(*_data(shards))
    assert f"{shards}: cannot be read (Permission denied)" in line


def test_shards_that_are_not_those_of_the_index(refusal, tmp_path):
    write_shards(tmp_path / "set", samples=6, per_shard=3)
    next((tmp_path / "set").glob("*.tar")).unlink()
    assert "index_shards.py" in refusal(*_data(tmp_path / "set"))


@pytest.mark.parametrize(
    ("url", "secret", "part"),
    [
        ("s3://data/set", "wrong", "bucket data: access denied"),
        ("s3://absent/set", None, "no bucket absent"),
        ("s3://data/nothing", None, "no shard matches s3://data/nothing"),
    ],
)
def test_buckets(refusal, s3, monkeypatch, shards, url, secret, part):
    for name, value in (s3 | ({"AWS_SECRET_ACCESS_KEY": secret} if secret else {})).items():
        monkeypatch.setenv(name, value)
    assert part in refusal(*_data(shards), f"data.url={url}")
    if url != "s3://data/nothing":  # the same bucket for the run itself
        assert part in refusal(*_data(shards), f"run.root={url}")


def test_a_storage_server_that_does_not_answer(refusal, monkeypatch, shards):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    line = refusal(*_data(shards), "data.url=s3://data/set")
    assert "http://127.0.0.1:1 does not answer" in line and "AWS_ENDPOINT_URL" in line


def test_a_folder_without_captions(monkeypatch, capsys, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr(sys, "argv", ["prepare_shards.py", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main_exit(prepare_shards.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "have no caption, first x.png" in error and "x.txt" in error and "--no-captions" in error
    assert not (tmp_path / "out").exists()


def test_more_workers_than_the_machine_is_told_to_have(environment):
    config = load_config("ldm_demo", ["workers.count=4", "workers.cpus=2", "data.read_cpus=0.5"])
    assert cluster.local_cpus(config) >= 4 * (2 + 1)
    cluster.check_room(config, {"CPU": 10.0, "GPU": 0.0})
    with pytest.raises(BadRequest, match=r"need 10 CPUs, Ray has 9\.5: "):
        cluster.check_room(config, {"CPU": 9.5, "GPU": 0.0})
    with_gpus = load_config("ldm_demo", ["workers.count=4", "workers.use_gpu=true"])
    cluster.check_room(with_gpus, {"CPU": 8.0, "GPU": 4.0})
    with pytest.raises(BadRequest, match="Ray has 3; use fewer workers"):
        cluster.check_room(with_gpus, {"CPU": 8.0, "GPU": 3.0})


def test_overrides_alone_change_the_default_preset(ends, shards, tmp_path):
    summary = tmp_path / "new" / "folder" / "summary.json"
    overrides = [*_data(shards), "objective.autoencoder=null", "data.global_batch_size=4", "run.steps=550"]
    code, out, _ = ends(*overrides, "--dry-run", "--summary", summary)
    assert code == 0
    facts = json.loads(summary.read_text())
    assert facts["samples"] == 12 and facts["steps_an_epoch"] == 3 and facts["epochs"] == pytest.approx(550 / 3)
    assert "name: refused" in out


def test_a_failed_check_leaves_no_summary(refusal, tmp_path):
    refusal("data.url=/nowhere", "data.demo=null", "--summary", tmp_path / "summary.json")
    assert not (tmp_path / "summary.json").exists()


def _subprocess(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "pipelines" / script), *arguments],
        env=environment | {"RUN_ROOT": str(root)},
        cwd=root,  # not the checkout: the script finds its packages by itself
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "part"),
    [
        ("train_ldm.py", ["objective.autoencoder=models:/absent/1", "tracking.uri=null"], "no registered model"),
        ("train_autoencoder.py", ["workers.count=2", "workers.local_cpus=2"], "need 4 CPUs, Ray has 2"),
        ("prepare_shards.py", ["nowhere", "out"], "nowhere is not a folder"),
    ],
)
def test_the_real_command_ends_with_one_line(tmp_path, shards, script, arguments, part):
    data = _data(shards) if script.startswith("train") else []
    ended = _subprocess(tmp_path, script, *data, *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert part in ended.stderr


def test_help_names_units_and_defaults(ends):
    code, out, error = ends("--help")
    assert code == 0 and error == ""
    assert "run.steps  (required) training steps" in out
    assert "optimizer.learning_rate  (default 0.0001)" in out
