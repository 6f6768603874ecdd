"""Through Ray: models side by side in one run, an average of another length, and low-rank adapters on one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import AutoencoderKL

from genmodels.diffusion.pipeline import TextToImage
from infra.storage import open_filesystem
from pipelines.training.checkpoint import assemble
from pipelines.training.export import export_run
from pipelines.training.run_folder import RunFolder
from tests.genmodels import tiny
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow

Train = Callable[..., dict[str, Any]]
STEPS = 12
DIFFUSION = {"kind": "latent_diffusion", "image_size": 16, "denoiser": tiny.UNET, "text_encoder": tiny.TEXT}
AUTOENCODER = {"kind": "autoencoder", "image_size": 16, "channels": [8, 8], "layers_per_block": 1, "norm_groups": 4}
LENGTH = f"run.steps={STEPS}", f"run.checkpoint_every={STEPS}", "run.audit=false"


@pytest.fixture(scope="module")
def together(train: Train) -> dict[str, Any]:
    objective = {"kind": "side_by_side", "members": {"pixels": DIFFUSION, "kl": AUTOENCODER}}
    averages = "ema.lengths=[0.05,0.1]", "ema.store_every=1"
    written = f"objective={yaml.safe_dump(objective, default_flow_style=True, width=9999).strip()}"
    return train("run.name=together", written, *LENGTH, *averages)


def test_each_member_leaves_what_it_would_leave_alone(together: dict[str, Any]) -> None:
    export = Path(together["export"])
    drawn = TextToImage.from_folder(export / "pixels").draw(["a red seven on a white background"], [0], num_steps=2)
    assert drawn.shape == (1, 16, 16, 3)
    figures = together["figures"]
    assert AutoencoderKL.from_pretrained(export / "kl").config.scaling_factor == pytest.approx(
        1 / figures["kl/latent_std"], rel=1e-5
    )
    assert {"loss", "pixels/loss", "kl/loss", "seconds_pixels-denoiser", "seconds_kl-autoencoder"} <= set(figures)
    folder = RunFolder(together["run_folder"])
    assert len(small_run.metric(folder, "pixels/loss")) == len(small_run.metric(folder, "kl/kl")) == STEPS
    assert together["model_uri"] is None


def test_an_average_of_another_length_is_exported_afterwards(together: dict[str, Any]) -> None:
    folder = RunFolder(together["run_folder"])
    export, facts = export_run(folder, ema_length=0.13)
    assert export.endswith(f"{STEPS:08d}-ema-0.13") and 0 < facts["ema_profile_error"] < 0.05
    usual, other = (AutoencoderKL.from_pretrained(Path(path) / "kl") for path in (together["export"], export))
    assert any(not a.equal(b) for a, b in zip(usual.parameters(), other.parameters(), strict=True))
    filesystem, path = open_filesystem(folder.averages)
    assert sorted({int(Path(name).name[:8]) for name in filesystem.ls(path, detail=False)}) == list(range(1, STEPS + 1))


def test_low_rank_adapters_are_all_that_is_trained_and_kept(together: dict[str, Any], train: Train) -> None:
    base = f"{together['export']}/pixels"
    adapted = {**DIFFUSION, "lora": {"rank": 2}}
    summary = train(
        "run.name=adapted",
        f"objective={yaml.safe_dump(adapted, default_flow_style=True, width=9999).strip()}",
        f"run.init_from={base}",
        "engine.zero_stage=2",
        *LENGTH,
    )
    kept = assemble(small_run.newest(RunFolder(summary["run_folder"])), "param")["denoiser"]
    assert kept and all(".lora_" in name for name in kept)
    before, after = (TextToImage.from_folder(Path(path)).denoiser.state_dict() for path in (base, summary["export"]))
    changed = {
        name.split(".")[-2] if name.split(".")[-2] != "0" else "to_out"
        for name in before
        if not before[name].equal(after[name])
    }
    assert changed == {"to_q", "to_k", "to_v", "to_out"}
    assert (Path(summary["export"]) / "lora" / "pytorch_lora_weights.safetensors").is_file()
