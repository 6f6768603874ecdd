import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from infra.errors import BadRequest
from pipelines.demo import judge_model, judgement
from tests.genmodels.tiny import CAPTIONS, diffusion_config, write_inputs
from tests.pipelines.demo.test_judge_and_evaluation import draw_real


@pytest.fixture
def fake_model(monkeypatch, tmp_path):
    """A model that draws real training digits; its calls are recorded."""
    calls: list[dict] = []

    def open_model(folder, device, precision):
        calls.append({"precision": precision})
        model.precision = precision
        return model

    def draw(prompts, seeds, progress=None, **options):
        calls.append({"prompts": prompts, "seeds": seeds, **options})
        return draw_real(prompts, seeds)

    model = SimpleNamespace(draw=draw, conditional=True, image_size=32)
    fake = SimpleNamespace(TextToImage=SimpleNamespace(from_folder=open_model))
    monkeypatch.setitem(sys.modules, "genmodels.diffusion.pipeline", fake)
    monkeypatch.setattr(judgement, "find_export", lambda model, uri: tmp_path)
    return calls


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["judge_model.py", *arguments])
    judge_model.main()


def test_figures_grid_and_report_are_written(fake_model, monkeypatch, tmp_path):
    (tmp_path / "facts.json").write_text('{"model_uri": "models:/ldm-demo/1"}')
    (tmp_path / "history.json").write_text('[{"step": 0, "loss": 1.0}, {"step": 9, "loss": 0.5}]')
    outputs = {name: str(tmp_path / "out" / name) for name in ("summary.json", "report.html", "grid.png")}
    run(
        monkeypatch, "any", "--count", "60", "--batch-size", "16", "--num-steps", "7", "--guidance-scale", "3",
        "--precision", "bf16",
        "--summary", outputs["summary.json"], "--report", outputs["report.html"], "--grid", outputs["grid.png"],
        "--facts", str(tmp_path / "facts.json"), "--history", str(tmp_path / "history.json"),
    )  # fmt: skip
    summary = json.loads(Path(outputs["summary.json"]).read_text())
    for name in ("consistency", "consistency_ratio", "consistency_shuffled", "coverage_ratio", "seconds_per_100"):
        assert 0 <= summary[name] < 2
    assert summary["count"] == 60 and summary["grid"] == outputs["grid.png"] and summary["num_steps"] == 7
    assert "models:/ldm-demo/1" in Path(outputs["report.html"]).read_text()
    assert summary["precision"] == fake_model[0]["precision"] == "bf16"
    drawn = fake_model[-1]  # after one picture ahead of the clock
    assert drawn["seeds"] == list(range(60)) and len(drawn["prompts"]) == 60
    assert (drawn["num_steps"], drawn["guidance_scale"], drawn["batch_size"]) == (7, 3, 16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--count", "1001"], "multiple of the 20"),
        (["--num-steps", "0"], "--num-steps must be at least 1"),
        (["--facts", "no-such-file.json"], "cannot read no-such-file.json"),
    ],
)
def test_bad_requests_say_what_to_do(fake_model, monkeypatch, arguments, said):
    with pytest.raises(BadRequest, match=said):
        run(monkeypatch, "any", *arguments)
    assert not fake_model, "nothing may be drawn before the request is known to be good"


def test_help_names_units_and_defaults_without_loading_torch():
    code = (
        "import sys, runpy; sys.argv = ['judge_model.py', '--help']\n"
        f"try: runpy.run_path({judge_model.__file__!r}, run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    assert "multiple of 20 (default: 1000)" in " ".join(result.stdout.split())


def test_pictures_from_processes_are_those_of_one_process(tmp_path):
    from genmodels.diffusion.pipeline import TextToImage
    from genmodels.families import build_objective
    from pipelines.demo.parallel_draw import DrawingPool

    write_inputs(tmp_path / "inputs")
    build_objective(diffusion_config(), tmp_path / "inputs").export(tmp_path / "export")
    prompts, seeds, options = CAPTIONS * 3, list(range(12)), {"num_steps": 3, "batch_size": 5}
    done: list[tuple[float, int]] = []
    with DrawingPool(tmp_path / "export", 2) as pool:
        drawn = pool.draw(prompts, seeds, lambda *n: done.append(n), **options)
    expected = TextToImage.from_folder(tmp_path / "export").draw(prompts, seeds, **options)
    assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1 and np.ptp(expected) > 20
    assert done == [(5, 12), (10, 12), (12, 12)]
