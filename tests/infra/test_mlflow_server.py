"""The same tracking and registry code against an MLflow server, where artifacts pass through the server."""

from __future__ import annotations

import pytest

from infra import registry, tracking
from infra.exports import folder_digest
from infra.mlflow_store import open_client
from infra.tracking import RunLogger
from tests.servers import mlflow_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_ROOT", str(folder / "runs"))
        with mlflow_server(folder) as uri:
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            yield uri


def test_a_run_and_its_model_on_a_server(server, tmp_path):
    from diffusers import AutoencoderKL
    from PIL import Image

    assert tracking.check_tracking(None, nodes=4) == server
    run_id = tracking.start_run(None, "tests", "remote", params={"steps": 3})
    for first in (0, 2):  # the second time as after a restart
        with RunLogger(None, run_id) as logger:
            for step in range(first, first + 4):
                logger.log(step, {"train/loss": 1.0})
            logger.log_image("grid", Image.new("RGB", (8, 8)), 3)
    client = open_client()
    assert sorted(metric.step for metric in client.get_metric_history(run_id, "train/loss")) == list(range(6))
    assert len([a for a in client.list_artifacts(run_id, "images") if a.path.endswith(".png")]) == 1

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, **blocks)
    autoencoder.save_pretrained(tmp_path / "ae")
    reference = registry.register_export(None, run_id, tmp_path / "ae", "ae", {"layout": "AutoencoderKL"}, "", {})
    assert reference == "models:/ae/1"
    folder = registry.resolve_model("models:/ae")
    assert folder_digest(folder) == folder_digest(tmp_path / "ae")
    assert registry.resolve_model("models:/ae/1") == folder  # the second time without a download
    tracking.finish_run(None, run_id)
    assert client.get_run(run_id).info.status == "FINISHED"
