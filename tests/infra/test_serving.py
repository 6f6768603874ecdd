"""`mlflow models serve` answers prompts with PNGs over REST, and wrong requests with 400 and the reason."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from genmodels.families import build_objective
from infra import registry, tracking
from infra.exports import folder_digest
from infra.mlflow_store import open_client
from tests.genmodels import tiny
from tests.servers import _serving, free_port

OPTIONS = {"num_steps": 2, "guidance_scale": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store in which the champion of `tiny` is its version 1, and `pairs` makes images of images."""
    folder = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run_id = tracking.start_run(None, "tests", "tiny")
        build_objective(tiny.diffusion_config(), tiny.write_inputs(folder / "inputs")).export(folder / "export")
        build_objective(tiny.cycle_config()).export(folder / "pairs")
        registry.register_export(None, run_id, folder / "export", "tiny", {}, "seed: 0\n", {})
        registry.register_export(None, run_id, folder / "pairs", "pairs", {}, "seed: 0\n", {})
        open_client().set_registered_model_alias("tiny", "champion", "1")
        mlflow.set_tracking_uri(tracking.tracking_uri())
        yield folder


@pytest.fixture(scope="module")
def model(root: Path) -> Any:
    return mlflow.pyfunc.load_model("models:/tiny@champion")


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/tiny@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri())
        # MLflow starts uvicorn by name, as in an environment that was activated.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        with _serving(command, port, root / "serve.log", 60):
            yield f"http://127.0.0.1:{port}/invocations"


def ask(server: str, content: Any) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server, json.dumps(content).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def pictures(answer: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(row["png"]))) for row in answer["predictions"]]


@pytest.mark.slow
def test_a_prompt_by_rest_is_the_picture_of_the_model_itself(server: str, model: Any, root: Path) -> None:
    rows = [{"prompt": "blue 3", "seed": seed, **OPTIONS} for seed in (1, 2, 1)]
    status, answer = ask(server, {"dataframe_records": rows})
    assert status == 200
    one, other, again = (np.asarray(picture) for picture in pictures(answer))
    assert (one == again).all() and (one != other).any()
    (own,) = model.predict(pd.DataFrame(rows[:1]))["png"]
    assert (np.asarray(Image.open(io.BytesIO(own))) == one).all()

    told = pictures(answer)[1].text  # type: ignore[attr-defined]
    assert (told["Model"], told["Prompt"], told["Seed"]) == ("tiny", "blue 3", "2")
    assert told["Model digest"] == folder_digest(root / "export") and told["Software"] == "genmodels"
    assert json.loads(told["Settings"]) == {**OPTIONS, "sampler": "ddim", "negative_prompt": None}

    split = {"columns": ["prompt", "seed", *OPTIONS], "data": [["blue 3", 2, *OPTIONS.values()]]}
    status, answer = ask(server, {"dataframe_split": split})
    assert status == 200 and (np.asarray(pictures(answer)[0]) == other).all()
    status, answer = ask(server, {"dataframe_records": [rows[1], {"prompt": "blue 3", "num_steps": 2}]})
    assert status == 200 and (np.asarray(pictures(answer)[0]) == other).all(), "a row may leave out what is optional"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"seed": 1}, r"Model is missing inputs \['prompt'\]"),
        ({"prompt": None}, "row 0: prompt must be text, not missing"),
        ({"prompt": 5}, "row 0: prompt must be text, not 5"),
        ({"prompt": "a", "seed": "x"}, "row 0: seed must be a whole number from .* not 'x'"),
        ({"prompt": "a", "guidance_scale": "much"}, "row 0: guidance_scale must be a number, not 'much'"),
        ({"prompt": "a", "num_steps": 2000}, "num_steps is 2000, this model takes 1 to 1000"),
    ],
)
def test_a_wrong_request_is_400_with_the_reason(server: str, row: dict[str, Any], said: str) -> None:
    status, answer = ask(server, {"dataframe_records": [row]})
    assert status == 400 and "stack_trace" not in answer
    assert re.search(said, answer["message"].splitlines()[-1])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "seed": 1.5}], "row 0: seed must be a whole number"),
        ([{"prompt": "a"}, {"prompt": "a", "seed": 2**53 + 1}], "row 1: seed .*53 bits at most"),
        ([{"prompt": "a", "seed": 2**63}], "row 0: seed must be a whole number"),
        ([{"prompt": "a", "num_steps": 0}], "row 0: num_steps must be a whole number from 1"),
        ([{"prompt": "a", "num_steps": True}], "row 0: num_steps must be a whole number from 1"),
        ([{"prompt": "a", "guidance_scale": float("inf")}], "row 0: guidance_scale must be a number"),
    ],
)
def test_values_that_are_none_name_row_and_column(model: Any, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(MlflowException, match=said) as caught:
        model.predict(pd.DataFrame(rows))
    assert caught.value.get_http_status_code() == 400


def test_numbers_of_any_type_draw_the_same_and_large_seeds_are_exact(model: Any) -> None:
    frame = pd.DataFrame({"prompt": ["a", "a"], "seed": [2**62 + 1, 2**62], "num_steps": [2, 2], "guidance_scale": 2})
    one, other = model.predict(frame)["png"]
    assert one != other and Image.open(io.BytesIO(one)).text["Seed"] == str(2**62 + 1)  # type: ignore[attr-defined]
    others = pd.DataFrame({"prompt": ["a"], "seed": [2**62 + 1], "num_steps": [2.0], "guidance_scale": [2.0]})
    assert model.predict(others)["png"][0] == one


def test_an_image_is_told_as_a_file_and_what_is_none_is_refused(root: Path) -> None:
    pairs = mlflow.pyfunc.load_model("models:/pairs/1")
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(stream, "PNG")
    frame = pd.DataFrame({"image": [stream.getvalue()] * 2, "direction": ["ab", "ba"]})
    ab, ba = (Image.open(io.BytesIO(png)) for png in pairs.predict(frame)["png"])
    assert (np.asarray(ab) != np.asarray(ba)).any()
    assert json.loads(ba.text["Settings"]) == {"direction": "ba"}  # type: ignore[attr-defined]
    with pytest.raises(MlflowException, match="row 1: image must be an image file"):
        pairs.predict(pd.DataFrame({"image": [stream.getvalue(), b"none"]}))
    with pytest.raises(MlflowException, match="direction"):
        pairs.predict(pd.DataFrame({"image": [stream.getvalue()], "direction": ["up"]}))
