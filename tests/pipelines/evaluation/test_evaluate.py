"""The command on a tiny model through Ray: what it measures, what it keeps, what it writes and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genmodels.metrics.figure import Conditions, Figure
from infra.errors import BadRequest
from infra.mlflow_store import open_client
from pipelines import evaluate as script
from pipelines.evaluation import run
from pipelines.evaluation.command import argument_parser, evaluate_model, read_figures, show_against
from pipelines.evaluation.measure import measure
from tests.pipelines.demo.test_report import Page
from tests.pipelines.training import small_run

COUNT = 48
SMALL = ["--count", str(COUNT), "--num-steps", "3", "--batch-size", "8", "--features", "digits", "--curve-count", "0"]


@pytest.fixture
def evaluate(alone, local_ray, run_root, shards, tmp_path, monkeypatch):
    """`evaluate(…)` measures the run that nothing happened to; gives the summary."""
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*arguments: str, model: str = alone.url, data: str = shards, out: str = "out") -> dict:
        command = [model, *SMALL, "--data", data, "--out", str(tmp_path / out), *arguments]
        return evaluate_model(argument_parser().parse_args(command))

    return call


def figures(summary: dict) -> dict[str, float]:
    return {row["name"]: row["value"] for row in summary["figures"]}


@pytest.mark.slow
def test_figures_are_the_same_at_any_number_of_actors_and_real_pictures_are_measured_once(evaluate, monkeypatch):
    measured = []

    def recorded(sources, *rest):
        measured.append(set(sources))
        return measure(sources, *rest)

    monkeypatch.setattr(run, "measure", recorded)
    first = evaluate("--no-log", "--actors", "1", out="1")
    assert len(figures(first)) > 8
    for actors in ("2", "4"):
        other = evaluate("--no-log", "--actors", actors, "--against", first["figures_file"], out=actors)
        assert figures(other) == pytest.approx(figures(first), abs=1e-6)
        assert set(other["against"].values()) == {"undecided"}
    assert measured[1:] == [{"generated"}] * 2


@pytest.mark.slow
def test_page_figures_and_mlflow_hold_what_was_measured(evaluate, alone, tmp_path):
    curves = ["--curve-count", "16", "--curve-steps", "2", "--curve-guidance", "1"]
    summary = evaluate("--actors", "2", *curves, "--summary", str(tmp_path / "summary.json"))
    page = Page(Path(summary["report"]).read_text())
    text = " ".join(page.words)
    for said in ("frechet distance", "By word of the caption", "Nearest training pictures", "Steps and guidance"):
        assert said in text
    assert len(page.images) >= COUNT // 2 and all(image.startswith("data:image/png") for image in page.images)
    written = json.loads(Path(summary["figures_file"]).read_text())
    conditions = written["figures"][0]["conditions"]
    assert (conditions["count"], conditions["num_steps"], conditions["sampler"]) == (COUNT, 3, "ddim")
    assert conditions["extractor"] and conditions["data"] and conditions["training_data"]
    assert {curve["setting"] for curve in written["curves"]} == {"steps", "guidance"}
    assert [point["setting"] for point in written["curves"][0]["points"]] == [2, 3]
    described = alone.read("run.json")
    client = open_client(described["tracking_uri"])
    logged = client.get_run(described["mlflow_run_id"]).data.metrics
    assert logged["evaluation_recall"] == pytest.approx(figures(summary)["recall"])
    names = {item.path for item in client.list_artifacts(described["mlflow_run_id"], "evaluation")}
    assert names == {"evaluation/report.html", "evaluation/figures.json"}
    assert json.loads((tmp_path / "summary.json").read_text())["report"] == summary["report"]


def test_figures_that_were_measured_otherwise_are_not_compared(tmp_path, capsys):
    def row(seed: int, value: float) -> dict:
        conditions = Conditions(count=10, seed=seed)
        low, high = value - 1, value + 1
        figure = Figure(name="recall", value=value, low=low, high=high, better="higher", conditions=conditions)
        return figure.model_dump()

    earlier = tmp_path / "figures.json"
    earlier.write_text(json.dumps({"figures": [row(0, 5.0)]}))
    assert show_against([row(0, 9.0)], read_figures(str(earlier))) == {"recall": "better"}
    assert "recall: better (was 5)" in capsys.readouterr().out
    with pytest.raises(BadRequest, match="recall: measured differently, so not compared: seed is 1 and 0"):
        show_against([row(1, 9.0)], read_figures(str(earlier)))
    earlier.write_text("[]")
    with pytest.raises(BadRequest, match=r"name its figures\.json"):
        read_figures(str(earlier))


@pytest.mark.slow
def test_a_folder_of_pictures_is_measured_as_it_is(evaluate, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{number}.png")
    summary = evaluate("--no-log", model=str(folder))
    assert summary["figures"][0]["conditions"]["count"] == 20 and summary["digest"] is None
    assert figures(summary)["recall"] == 0, "noise is no digit"
    assert {"modes", "distance"} <= {finding["kind"] for finding in summary["findings"]}
    assert "caption_consistency" not in figures(summary)
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(BadRequest, match=r"broken\.png"):
        evaluate("--no-log", model=str(folder), out="broken")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--count", "3"], "--count must be at least 10"),
        (["--curve-steps", "5,x"], "--curve-steps 5,x: write numbers"),
        (["--num-steps", "0"], "--num-steps must be at least 1"),
        (["--against", "nowhere.json"], "--against nowhere.json: cannot be read"),
        (["--actors", "0"], "--actors must be at least 1"),
        (["--curve-count", "5"], "--curve-count must be 0 or at least 10"),
    ],
)
def test_bad_requests_say_what_to_do(arguments, said):
    with pytest.raises(BadRequest, match=said):
        evaluate_model(argument_parser().parse_args(["models:/none/1", *arguments]))


def test_a_folder_without_data_or_extractor_is_told_what_to_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    small_run.write_digits(str(tmp_path / "shards"), 40)
    shards = ["--data", str(tmp_path / "shards")]
    with pytest.raises(BadRequest, match="pictures: 1 are too few"):
        evaluate_model(argument_parser().parse_args([str(tmp_path), "--features", "digits", *shards]))
    with pytest.raises(BadRequest, match="--features dinov2:"):
        evaluate_model(argument_parser().parse_args([str(tmp_path)]))
    with pytest.raises(BadRequest, match="--data URL"):
        evaluate_model(argument_parser().parse_args([str(tmp_path), "--features", "digits"]))
    with pytest.raises(BadRequest, match="KIND:PATH"):
        evaluate_model(argument_parser().parse_args([str(tmp_path), "--features", "vgg:there"]))


def test_help_names_defaults_without_loading_torch():
    code = (
        "import sys, runpy; sys.argv = ['evaluate.py', '--help']\n"
        f"try: runpy.run_path({script.__file__!r}, run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert "pictures to draw (default: 2000)" in " ".join(result.stdout.split())
