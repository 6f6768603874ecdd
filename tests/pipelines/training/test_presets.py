"""Every demo preset takes one step: its networks are built, its loss is finite, its weights move."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from genmodels.clip.layout import clip_sizes
from genmodels.families import build_objective, objective_class
from genmodels.text import tokenizer
from genmodels.text.encoder import fetch_pretrained
from pipelines.data.batch import RankBatch
from pipelines.training.config import TrainConfig, load_config
from pipelines.training.embeddings import clip_reference, embedding_member
from pipelines.training.presets import PRESETS, read_preset
from pipelines.training.trainer import Trainer
from pipelines.unclip.config import load_stages
from tests.genmodels.tiny import CAPTIONS
from tests.pipelines.training.test_config import GIVEN

# Presets of `train_unclip.py` name presets of stages, and are no training themselves.
TRAININGS = sorted(path.stem for path in PRESETS.glob("*.yaml") if "run" in read_preset(str(path)))
OF_STAGES = sorted({path.stem for path in PRESETS.glob("*.yaml")} - set(TRAININGS))
DEMO_PRESETS = [name for name in TRAININGS if name.endswith("_demo")]
BATCH = 4


def small_batches(preset: str) -> TrainConfig:
    smaller = [f"data.global_batch_size={BATCH}", "workers.count=1", "engine.kind=torch"]
    whole = preset in ("damsm_demo", "attn_gan_demo")  # whose losses compare the samples of a batch
    return load_config(preset, [*smaller, f"data.micro_batch={BATCH if whole else 2}"])


def inputs_of(config: TrainConfig, folder: Path) -> Path:
    """What the run would collect first, untrained: an autoencoder, a CLIP, a DAMSM, a text encoder, and a tokenizer."""
    objective: Any = config.objective
    if (damsm := getattr(objective, "damsm", None)) is not None:
        trained = load_config(damsm.removeprefix("preset:"), [])
        build_objective(trained.objective, inputs_of(trained, folder / "for damsm")).export(folder / "damsm")
        shutil.copytree(folder / "damsm" / "tokenizer", folder / "tokenizer")
    if (named := clip_reference(objective)) is not None:
        trained = load_config(named[1].removeprefix("preset:"), [])
        pair: Any = build_objective(trained.objective, inputs_of(trained, folder / "for clip"))
        size, length = trained.objective.image_size, pair.config.text_encoder.length
        with torch.no_grad():
            pair.finish([{"images": torch.rand(9, 3, size, size), "token_ids": torch.randint(0, 200, (9, length)),
                          "weight": torch.ones(9)}])  # fmt: skip
        (folder / "clip").mkdir(parents=True)
        pair.export(folder / "clip")
        if isinstance(getattr(objective, "clip", None), str):
            tokenizer.save(pair.tokenizer, folder / "tokenizer")
    first = getattr(objective, "autoencoder", None)
    if first is not None:
        build_objective(load_config(first.removeprefix("preset:"), []).objective).export(folder / "autoencoder")
    text = getattr(objective, "text_encoder", None)
    if text is not None and text.kind == "pretrained":
        first = load_config(text.path.removeprefix("preset:"), [])
        (folder / "text").mkdir(parents=True)
        build_objective(first.objective, inputs_of(first, folder / "text")).export(folder / "text")
        fetch_pretrained(str(folder / "text"), folder)
    elif text is not None and text.kind in ("trained", "recurrent"):
        tokenizer.save(tokenizer.train_tokenizer(CAPTIONS * 4, text.vocab_size, text.length), folder / "tokenizer")
    return folder


def random_batch(config: TrainConfig, inputs: Path) -> RankBatch:
    size = config.objective.image_size
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(BATCH)]
    batch: RankBatch = {
        "images": torch.randint(0, 256, (BATCH, 3, size, size), generator=torch.Generator().manual_seed(0)).byte(),
        "weight": torch.ones(BATCH),
        "seeds": torch.arange(BATCH),
        "keys": [f"00000.tar/{i}" for i in range(BATCH)],
        "captions": captions,
        "reasons": [""] * BATCH,
        "step": 0,
    }
    if embedding_member(config.objective) is not None:
        batch["image_embeddings"] = torch.nn.functional.normalize(torch.rand(BATCH, clip_sizes(inputs / "clip")[1]))
    if (inputs / "tokenizer").is_dir():
        batch["token_ids"] = tokenizer.encode(tokenizer.load(inputs / "tokenizer"), captions)
    if getattr(config.objective, "image_condition", None) is not None:
        batch["condition_images"] = batch["images"].flip(0)
    if getattr(config.objective, "unpaired", False):
        batch["other"] = {**batch, "images": batch["images"].flip(0)}
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("preset", DEMO_PRESETS)
def test_every_demo_preset_takes_one_step(preset, tmp_path):
    config = small_batches(preset)
    inputs = inputs_of(config, tmp_path)
    torch.manual_seed(0)
    objective = build_objective(config.objective, inputs)
    trainer = Trainer(config, objective, torch.device("cpu"))
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in objective.networks.items()}
    frozen = [p.detach().clone() for network in objective.frozen.values() for p in network.parameters()]
    trainer.step(0, random_batch(config, inputs))

    logged = trainer.log.read()
    assert 0 < logged["loss"] < 100 and "skipped_steps" not in logged
    assert 0 < trainer.last["grad_norm"] < float("inf")
    assert trainer.last["learning_rate"] == pytest.approx(
        config.optimizer.learning_rate / max(config.optimizer.warmup_steps, 1)
    )
    for phase in objective.phases:
        if phase.runs_at(0):
            after = objective.networks[phase.network].parameters()
            moved = [not torch.equal(old, new) for old, new in zip(before[phase.network], after, strict=True)]
            assert sum(moved) > 0.9 * len(moved)
    now = [p for network in objective.frozen.values() for p in network.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(frozen, now, strict=True))


def test_there_are_demo_presets():
    assert {"autoencoder_demo", "clip_demo", "ldm_demo"} <= set(DEMO_PRESETS)


def given(preset: str) -> TrainConfig:
    """A preset with what it leaves to be given."""
    classes = f"objective.classes={[str(number) for number in range(1000)]}"
    return load_config(preset, [*GIVEN.get(preset, []), *([classes] if preset.startswith("dit") else [])])


def backbone_parameters(config: TrainConfig) -> int:
    networks = objective_class(config.objective.kind).abstract_networks(config.objective)
    network = networks["denoiser"] if "denoiser" in networks else networks["autoencoder"]
    backbone: Any = getattr(network, "backbone", network)
    return sum(p.numel() for p in backbone.parameters())


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("autoencoder_256", 83_653_863),  # Stable Diffusion's AutoencoderKL
        ("autoencoder_vq_f4", 55_298_206),  # with 8,192 × 3 numbers of the codebook, a buffer here: 55.32 M
        ("ldm_bedrooms_f4", 274_056_163),  # 274.06 M
        ("ldm_churches_f8", 294_965_380),  # 294.96 M
        ("ldm_text_f8", 872_300_484),  # 872.30 M
        ("sd1", 859_520_964),
        ("sd2", 865_910_724),
        # The position embeddings of 256 tokens count as parameters there, though they are not trained.
        ("dit_s", 32_963_360 - 256 * 384),
        ("dit_b", 130_512_416 - 256 * 768),
        ("dit_l", 458_102_816 - 256 * 1024),
        ("dit_xl", 675_129_632 - 256 * 1152),
    ],
)
def test_published_sizes(preset, published):
    assert backbone_parameters(given(preset)) == published


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("unclip_clip_l14", 428e6),  # Radford et al. 2021's ViT-L/14 as transformers counts it
        ("unclip_prior_1b", 1e9),  # Ramesh et al. 2022, appendix C
        ("unclip_ar_prior_1b", 1e9),
        ("unclip_decoder_3b", 3.5e9),
        ("unclip_upsampler_256", 700e6),
        ("unclip_upsampler_1024", 300e6),
    ],
)
def test_published_sizes_of_unclip_within_five_percent(preset, published):
    objective = given(preset).objective
    (network,) = objective_class(objective.kind).abstract_networks(objective).values()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("preset", OF_STAGES)
def test_every_preset_of_stages_is_whole(preset):
    tree = read_preset(preset)
    names = ["clip", "decoder", *tree["priors"], *tree["upsamplers"]]
    given = [] if preset.endswith("_demo") else [f"{name}.data.url=s3://bucket/{name}" for name in names]
    stages = load_stages(preset, given)
    assert stages.config.name == preset.replace("_", "-") or preset == "unclip_paper"
    assert set(stages.trainings) == {"clip", *stages.config.priors, "decoder", *stages.config.upsamplers}
    assert stages.config.register_as


@pytest.mark.parametrize("preset", TRAININGS)
def test_every_preset_is_whole(preset):
    config = given(preset)
    assert config.run.name == preset.replace("_", "-")
    assert config.tracking.register_as == (None if "variants" in preset else config.run.name)


def test_a_preset_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text("a: {b: 1, c: 2}\nd: {kind: x, e: 3}\nf: 4\n")
    (tmp_path / "own.yaml").write_text(f"extends: {tmp_path}/base.yaml\na: {{c: 5}}\nd: {{kind: y, g: 6}}\n")
    assert read_preset(str(tmp_path / "own.yaml")) == {"a": {"b": 1, "c": 5}, "d": {"kind": "y", "g": 6}, "f": 4}
