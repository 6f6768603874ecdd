"""What is exported is opened by diffusers' own pipelines, offline, and draws the same picture from the same noise."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch

from genmodels import random
from genmodels.diffusion.config import export_layout
from genmodels.diffusion.pipeline import TextToImage
from genmodels.diffusion.sampler import SAMPLERS
from genmodels.families import build_objective
from tests.genmodels import tiny

EDM = {"prediction_type": "edm", "noise_schedule": "edm"}
FLOW = {"prediction_type": "flow", "noise_schedule": "flow", "flow_shift": 2.0}
POOLED = {"denoiser": {**tiny.UNET, "pooled_text": True, "scale_shift": True}}
DIT = {"kind": "dit", "patch_size": 2, "width": 24, "depth": 2, "heads": 3}
CLASSES = {"classes": ["one", "two", "three"], "text_encoder": {"kind": "none"}}
PIXELS = {"autoencoder": None, "text_encoder": {"kind": "none"}}
PROMPTS, NEGATIVE, SEEDS = tiny.CAPTIONS[:3], ["green", "", "paper"], [3, 4, 5]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(self, address):
        raise OSError(f"a test that must work offline asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def exported(inputs, folder, **changes):
    torch.manual_seed(1)
    objective = build_objective(tiny.diffusion_config(**changes), inputs)
    return objective, objective.export(folder)


@pytest.mark.parametrize(
    "changes",
    [{}, {"prediction_type": "epsilon"}, {"prediction_type": "epsilon", "noise_schedule": "cosine"}, FLOW, EDM, POOLED],
    ids=["v_prediction", "epsilon", "epsilon-cosine", "flow", "edm", "pooled text"],
)
def test_stable_diffusion_layout(inputs, tmp_path, changes):
    from diffusers import StableDiffusionPipeline

    _, facts = exported(inputs, tmp_path, **changes)
    assert facts["layout"] == "Stable Diffusion"
    assert not [p for p in tmp_path.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    sampler = "dpm_solver++" if changes is FLOW else "ddim"
    ours, theirs = TextToImage.from_folder(tmp_path), StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    latents = random.normal(torch.tensor(SEEDS), (4, 4, 4), "initial")
    # Where the steps do not divide 1000, diffusers' own step is a timestep off the grid (see DDIMSampler).
    for num_steps, levels in ((5, 0.5), (20, 0.5), (6, 16)):
        drawn = ours.draw(PROMPTS, SEEDS, NEGATIVE, num_steps=num_steps, guidance_scale=3.0, sampler=sampler)
        images = theirs(
            PROMPTS,
            negative_prompt=NEGATIVE,
            latents=latents,
            num_inference_steps=num_steps,
            guidance_scale=3.0,
            output_type="np",
        ).images
        assert np.abs(drawn / 255 - images).max() <= levels / 255 + 1e-3
        assert images.std() > 0.05  # there is a picture to compare


def test_ddpm_layout(inputs, tmp_path, monkeypatch):
    from diffusers import DDPMPipeline
    from diffusers.pipelines.ddpm import pipeline_ddpm

    _, facts = exported(inputs, tmp_path, **PIXELS)
    assert facts["layout"] == "DDPMPipeline"
    ours = TextToImage.from_folder(tmp_path).draw(None, SEEDS, num_steps=5, sampler="ddpm")
    initial = random.normal(torch.tensor(SEEDS), (3, 16, 16), "initial")
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: initial)
    steps = random.derive_seeds(torch.tensor(SEEDS), "sampler") & (2**63 - 1)
    generators = [torch.Generator().manual_seed(seed) for seed in steps.tolist()]
    theirs = DDPMPipeline.from_pretrained(tmp_path, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(len(SEEDS), generator=generators, num_inference_steps=5, output_type="np").images
    assert np.abs(ours / 255 - images).max() <= 0.5 / 255 + 1e-3


@pytest.mark.parametrize(
    "changes",
    [{"autoencoder": None}, {"text_encoder": {"kind": "none"}}, PIXELS | FLOW],
    ids=["pixels", "latents", "unconditional flow"],
)
def test_own_layout_opens_with_our_pipeline(inputs, tmp_path, changes):
    objective, facts = exported(inputs, tmp_path, **changes)
    assert facts["layout"] == "own" == export_layout(objective.config) and (tmp_path / "genmodels.json").is_file()
    model = TextToImage.from_folder(tmp_path)
    prompts = PROMPTS if model.conditional else None
    assert model.draw(prompts, SEEDS, num_steps=2).shape == (3, 16, 16, 3)


def test_dit_layout(inputs, tmp_path, monkeypatch):
    from diffusers import DiTPipeline
    from diffusers.pipelines.dit import pipeline_dit

    objective, facts = exported(inputs, tmp_path, **CLASSES, denoiser=DIT)
    fill(objective, tmp_path)
    assert facts["layout"] == "DiTPipeline"
    ours, names = TextToImage.from_folder(tmp_path), ["one", "two", "three"]
    initial = random.normal(torch.tensor(SEEDS), (4, 4, 4), "initial")
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **_: initial)
    theirs = DiTPipeline.from_pretrained(tmp_path, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    labels = theirs.get_label_ids(names)
    for guidance_scale in (1.0, 3.0):
        drawn = ours.draw(names, SEEDS, num_steps=5, guidance_scale=guidance_scale)
        images = theirs(labels, guidance_scale=guidance_scale, num_inference_steps=5, output_type="np").images
        assert np.abs(drawn / 255 - images).max() <= 0.5 / 255 + 1e-3 and images.std() > 0.05
    assert (drawn[0] != ours.draw(["two"], SEEDS[:1], num_steps=5, guidance_scale=3.0)[0]).any()
    with pytest.raises(ValueError, match="'seven' is no class of this model; it has one, two, three"):
        ours.draw(["seven"], [1])


def fill(objective, folder):
    """Give a network that begins as zero weights that draw something, and export it again."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in objective.denoiser.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    objective.export(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"denoiser": DIT},
        {"denoiser": DIT | {"text_attention": "joint"}},
        {"denoiser": DIT, "text_encoder": {"kind": "none"}},
        {"denoiser": DIT, "autoencoder": None, **CLASSES},
        CLASSES,
    ],
    ids=[
        "text by cross-attention",
        "text by joint attention",
        "a DiT told nothing",
        "a DiT in pixels",
        "U-Net of classes",
    ],
)
def test_what_diffusers_has_no_pipeline_for_is_opened_as_it_was(inputs, tmp_path, changes):
    changes = changes | ({"text_encoder": {"kind": "none"}} if "classes" in changes else {})
    objective, facts = exported(inputs, tmp_path / "export", **changes)
    fill(objective, tmp_path / "export")
    assert facts["layout"] == "own"
    torch.manual_seed(5)
    again = build_objective(objective.config, inputs)
    again.load_weights(tmp_path / "export")
    for (name, a), b in zip(again.denoiser.state_dict().items(), objective.denoiser.state_dict().values(), strict=True):
        assert a.equal(b), name
    model = TextToImage.from_folder(tmp_path / "export")
    prompts = (["one", "two", "three"] if model.classes else PROMPTS) if model.conditional else None
    with torch.no_grad():
        batch = tiny.with_tokens(tiny.batch(3), inputs) | {"captions": list(prompts or PROMPTS)}
        expected = objective.preview(batch).images
    drawn = model.draw(prompts, list(range(1234, 1237)), num_steps=15, guidance_scale=2.0)
    pixels = ((expected + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn - pixels).max() <= 1 and np.ptp(drawn) > 20


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("changes", [{}, FLOW, EDM], ids=["diffusion", "flow", "edm"])
def test_a_picture_depends_on_prompt_and_seed_alone(inputs, tmp_path, sampler, changes):
    exported(inputs, tmp_path, **changes)
    model = TextToImage.from_folder(tmp_path)
    done: list[float] = []
    options = {"num_steps": 4, "sampler": sampler}
    together = model.draw(PROMPTS, SEEDS, **options, progress=lambda drawn, total: done.append(drawn / total))
    alone = model.draw(PROMPTS, SEEDS, **options, batch_size=1)
    assert np.abs(together.astype(int) - alone).max() <= 1  # one grey level where rounding falls the other way
    assert done == ([i / 7 for i in range(1, 8)] if sampler == "heun" else [0.25, 0.5, 0.75, 1.0])
    seeded = model.draw([PROMPTS[0]] * 2, [3, 99], **options)
    same, other = (np.abs(picture.astype(int) - together[0]).max() for picture in seeded)
    assert same <= 1 < other


def test_bfloat16_draws_nearly_the_same(inputs, tmp_path):
    exported(inputs, tmp_path)
    drawn = [
        TextToImage.from_folder(tmp_path, precision=precision).draw(PROMPTS, SEEDS, num_steps=5).astype(int)
        for precision in ("fp32", "bf16")
    ]
    difference = np.abs(drawn[0] - drawn[1])
    assert difference.max() > 0 and difference.mean() < 4
    with pytest.raises(ValueError, match="must be one of fp32, bf16, auto"):
        TextToImage.from_folder(tmp_path, precision="fp16")


def test_the_preview_is_what_generate_draws(inputs, tmp_path):
    from genmodels.diffusion.objective import PREVIEW_SEED
    from genmodels.diffusion.pipeline import to_pixels

    objective, _ = exported(inputs, tmp_path)
    batch = tiny.with_tokens(tiny.batch(3), inputs)
    with torch.no_grad():
        preview = to_pixels(objective.preview(batch).images)
    seeds = [PREVIEW_SEED + i for i in range(3)]
    drawn = TextToImage.from_folder(tmp_path).draw(batch["captions"], seeds, num_steps=15, guidance_scale=2.0)
    assert np.abs(preview.astype(int) - drawn).max() <= 1


def test_bad_requests_are_named(inputs, tmp_path):
    exported(inputs, tmp_path / "text")
    exported(inputs, tmp_path / "plain", autoencoder=None, text_encoder={"kind": "none"})
    with pytest.raises(ValueError, match="one prompt per seed"):
        TextToImage.from_folder(tmp_path / "text").draw(["a"], [1, 2])
    with pytest.raises(ValueError, match="unconditional"):
        TextToImage.from_folder(tmp_path / "plain").draw(["a"], [1])
    with pytest.raises(ValueError, match=r"no unet/ or transformer/config\.json"):
        TextToImage.from_folder(tmp_path)
    assert TextToImage.from_folder(tmp_path / "plain").draw(None, []).shape == (0, 16, 16, 3)
