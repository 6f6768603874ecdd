"""An export becomes a registered model that opens without this checkout, and a reference becomes a folder again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from infra import registry, storage, tracking
from infra.errors import BadRequest
from infra.exports import export_kind, folder_digest
from infra.mlflow_store import open_client
from infra.model_card import model_card
from tests.servers import moto_s3

FACTS = {"description": "A tiny model.", "captions": ["a red seven"], "figures": {"consistency": 0.9, "a|b": 1}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="module")
def export(root):
    """A text-to-image model small enough to draw in no time: untrained, 8×8 pixels, without an autoencoder."""
    from genmodels.diffusion.config import LatentDiffusionConfig
    from genmodels.diffusion.objective import LatentDiffusion
    from genmodels.text.tokenizer import save, train_tokenizer

    config = LatentDiffusionConfig.model_validate(
        {
            "image_size": 8,
            "denoiser": {
                "kind": "unet",
                "channels": [8],
                "attention": [True],
                "layers_per_block": 1,
                "head_dim": 8,
                "norm_groups": 4,
            },
            "text_encoder": {"kind": "trained", "width": 8, "layers": 1, "heads": 1, "vocab_size": 520, "length": 12},
        }
    )
    save(train_tokenizer(["a red seven", "a blue one"], 520, 12), root / "inputs" / "tokenizer")
    LatentDiffusion.from_config(config, root / "inputs").export(root / "export")
    return root / "export"


@pytest.fixture(scope="module")
def registered(root, export):
    run_id = tracking.start_run(None, "tests", "tiny")
    reference = registry.register_export(None, run_id, export, "tiny", FACTS, "seed: 0\n", {"index_digest": "abc"})
    return run_id, reference


def test_version_carries_its_lineage(registered, export):
    run_id, reference = registered
    assert reference == "models:/tiny/1"
    version = registry.find_version(reference)
    assert version.run_id == run_id
    assert version.tags["index_digest"] == "abc" and version.tags["export_digest"] == folder_digest(export)
    assert version.description.startswith("# tiny")


def test_figures_of_an_evaluation_are_tags_of_the_version(registered):
    for recall in ("0.5 [0.4, 0.6]", "0.7 [0.6, 0.8]"):
        registry.tag_version(None, "tiny", "1", {"evaluation.recall": recall})
    version = registry.find_version(registered[1])
    assert version.tags["evaluation.recall"] == "0.7 [0.6, 0.8]" and version.tags["index_digest"] == "abc"


def test_registering_again_is_the_same_version(registered, export):
    run_id, reference = registered
    assert registry.register_export(None, run_id, export, "tiny", FACTS, "seed: 0\n", {}) == reference


def test_registering_repeats_no_metric(root, export):
    run_id = tracking.start_run(None, "tests", "once")
    with tracking.RunLogger(None, run_id) as logger:
        logger.log(0, {"train/loss": 1.0})
    registry.register_export(None, run_id, export, "once", FACTS, "", {})
    assert len(open_client().get_metric_history(run_id, "train/loss")) == 1


def test_references_lead_to_the_export(registered, export):
    open_client().set_registered_model_alias("tiny", "champion", "1")
    for reference in ("models:/tiny/1", "models:/tiny@champion", "models:/tiny", "models:/tiny/latest"):
        folder = registry.resolve_model(reference)
        assert folder_digest(folder) == folder_digest(export)
    assert registry.resolve_model(export) == export


def test_highest_version_is_by_number(root, export):
    client = open_client()
    client.create_registered_model("many")
    for _ in range(11):
        client.create_model_version("many", source=str(export))
    assert registry.find_version("models:/many").version in (11, "11")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/absent/1", "no registered model 'absent'.*there are: .*tiny"),
        ("models:/tiny/9", "no such version; there are: 1"),
        ("models:/tiny@nobody", "no such alias; aliases: .*; versions: 1"),
        ("models:/", "write models:/NAME/VERSION"),
        ("/nowhere/at/all", "no such folder"),
    ],
)
def test_what_is_not_there(registered, reference, message):
    with pytest.raises(BadRequest, match=message) as caught:
        registry.resolve_model(reference)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(registered, tmp_path):
    with pytest.raises(BadRequest, match="holds no model"):
        registry.resolve_model(tmp_path)
    with pytest.raises(BadRequest, match="no export to register"):
        registry.register_export(None, registered[0], tmp_path, "tiny", {}, "", {})
    with pytest.raises(BadRequest, match="may not be empty"):
        registry.register_export(None, registered[0], registry.resolve_model("models:/tiny"), "a/b", {}, "", {})


def test_an_export_in_object_storage(export, tmp_path, monkeypatch):
    with moto_s3(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        storage.upload_folder(export, "s3://data/export")
        folder = registry.resolve_model("s3://data/export")
        assert folder_digest(folder) == folder_digest(export)
        assert registry.resolve_model("s3://data/export") == folder
        storage.write_bytes("s3://data/export/new.json", b"{}")
        assert registry.resolve_model("s3://data/export") != folder
        with pytest.raises(BadRequest, match="holds nothing"):
            registry.resolve_model("s3://data/absent")


PREDICT = """
import sys, json, hashlib, mlflow, pandas
assert not any(path.rstrip("/") == sys.argv[1] for path in sys.path)
model = mlflow.pyfunc.load_model("models:/tiny/1")
frame = pandas.DataFrame({"prompt": ["a red seven", "a blue one", "a red seven"], "seed": [1, 1, 2]})
frame["num_steps"] = [2, 3, 2]
together = list(model.predict(frame)["png"])
alone = list(model.predict(frame.iloc[[2]].reset_index(drop=True))["png"])
bare = list(model.predict(pandas.DataFrame({"prompt": ["a red seven"]}))["png"])
import genmodels
assert not genmodels.__file__.startswith(sys.argv[1]), genmodels.__file__
digest = lambda pngs: [hashlib.sha256(png).hexdigest() for png in pngs]
json.dump([digest(together), digest(alone), bare[0][:8].hex()], open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_loads_and_draws_without_the_checkout(registered, root, tmp_path):
    """In another process, elsewhere, with nothing of this project on its path."""
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", PREDICT, checkout, str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    together, alone, magic = json.loads((tmp_path / "out.json").read_text())
    assert len(set(together)) == 3
    assert together[2] == alone[0]
    assert bytes.fromhex(magic) == b"\x89PNG\r\n\x1a\n"


def test_an_autoencoder_is_registered_and_reconstructs(root, tmp_path):
    import io

    import mlflow
    import pandas as pd
    from diffusers import AutoencoderKL
    from PIL import Image

    channels = {"block_out_channels": (4,), "down_block_types": ("DownEncoderBlock2D",)}
    autoencoder = AutoencoderKL(**channels, up_block_types=("UpDecoderBlock2D",), norm_num_groups=2, latent_channels=2)
    autoencoder.save_pretrained(tmp_path / "ae")
    assert export_kind(tmp_path / "ae") == "autoencoder"
    run_id = tracking.start_run(None, "tests", "ae")
    reference = registry.register_export(None, run_id, tmp_path / "ae", "ae", {"layout": "AutoencoderKL"}, "", {})
    assert export_kind(registry.resolve_model(reference)) == "autoencoder"
    mlflow.set_tracking_uri(tracking.tracking_uri())
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(buffer, "PNG")
    result = mlflow.pyfunc.load_model(reference).predict(pd.DataFrame({"png": [buffer.getvalue()]}))
    assert Image.open(io.BytesIO(result["png"][0])).size == (8, 8)


def test_a_text_encoder_is_registered_and_embeds(root, tmp_path):
    import mlflow
    import pandas as pd

    from genmodels.clip.objective import Clip
    from tests.genmodels import tiny

    tiny.write_inputs(tmp_path)
    clip = Clip.from_config(tiny.clip_config(), tmp_path)
    facts = clip.export(tmp_path / "clip")
    assert export_kind(tmp_path / "clip") == "clip"
    run_id = tracking.start_run(None, "tests", "clip")
    reference = registry.register_export(None, run_id, tmp_path / "clip", "clip", facts, "", {})
    mlflow.set_tracking_uri(tracking.tracking_uri())
    texts = ["a red seven", "a blue one"]
    found = mlflow.pyfunc.load_model(reference).predict(pd.DataFrame({"text": texts}))
    assert list(found.columns) == ["embedding"]
    np.testing.assert_allclose(np.stack(found["embedding"]), clip.embed_texts(texts).numpy(), atol=1e-6)


def test_a_damsm_is_registered_and_reads(root, tmp_path):
    import mlflow
    import pandas as pd

    from genmodels.gan.attention.frozen import FrozenDamsm
    from tests.genmodels import tiny

    tiny.write_damsm(tmp_path / "damsm", tiny.write_inputs(tmp_path))
    run_id = tracking.start_run(None, "tests", "damsm")
    reference = registry.register_export(None, run_id, tmp_path / "damsm", "damsm", {"layout": "own"}, "", {})
    assert export_kind(registry.resolve_model(reference)) == "damsm"
    mlflow.set_tracking_uri(tracking.tracking_uri())
    texts, damsm = ["a red seven", "a blue one"], FrozenDamsm.from_folder(tmp_path / "damsm")
    found = mlflow.pyfunc.load_model(reference).predict(pd.DataFrame({"text": texts}))
    expected = damsm.read_texts(damsm.tokens(texts)).sentence.numpy()
    np.testing.assert_allclose(np.stack(found["embedding"]), expected, atol=1e-6)


def test_model_card_tells_figures_and_how_to_open():
    card = model_card("tiny", {**FACTS, "layout": "Stable Diffusion", "resolution": 8})
    assert "| consistency | 0.9 |" in card and "| a\\|b | 1 |" in card
    assert "- a red seven" in card and "StableDiffusionPipeline" in card and "| resolution | 8 |" in card
    assert "AutoencoderKL.from_pretrained" in model_card("ae", {"layout": "AutoencoderKL"})
