"""All stages through Ray: trained, encoded, joined, registered; gone on with after a failure; then drawn with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from genmodels.clip.frozen import FrozenClip
from infra.errors import BadRequest
from infra.mlflow_store import open_client
from infra.registry import resolve_model
from pipelines.data.index import load_index
from pipelines.data.read import read_chunks
from pipelines.encoding import CLIP_MEMBER, Encoders, encode, open_clip
from pipelines.training.clip import measure_statistics, place_clip
from pipelines.training.embeddings import read_encoders
from pipelines.training.run_folder import RunFolder
from pipelines.unclip.config import load_stages
from pipelines.unclip.run import encode_for, train_stages
from tests.genmodels import tiny
from tests.genmodels.clip.test_objective import TRANSFORMER
from tests.pipelines.training import small_run

pytestmark = pytest.mark.slow

STEPS = 4
Train = Callable[..., dict[str, Any]]


def preset(path: Path, shards: str, name: str, objective: dict[str, Any], **data: Any) -> str:
    """A preset of a few steps; its run and its model are called by `name`."""
    small_run.write_preset(path, shards, steps=STEPS, checkpoint_every=STEPS, audit=False, finish_samples=64)
    tree = yaml.safe_load(path.read_text())
    tree["run"]["name"] = tree["tracking"]["register_as"] = name
    tree["objective"] = json.loads(json.dumps(objective))
    tree["data"] |= data
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture(scope="module")
def stages_preset(shards: str, run_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Presets of all stages of 8 to 16 pixels, and the one that names them."""
    folder, encoded = tmp_path_factory.mktemp("presets"), str(run_root / "digits-clip")
    text = {**tiny.TEXT}
    clip = preset(folder / "clip.yaml", shards, "tiny-clip", tiny.clip_config(embedding_dim=16).model_dump())
    named = {
        "clip": f"preset:{clip}",
        "embedding_member": "clip.npy",
        "clip_dim": 16,
        "clip_length": 12,
        "clip_width": 16,
    }
    priors = {
        kind: preset(folder / f"{kind}.yaml", encoded, f"tiny-{kind}", tiny.prior_config(kind, **named).model_dump())
        for kind in ("diffusion_prior", "autoregressive_prior")
    }
    embedding = {"clip": f"preset:{clip}", "member": "clip.npy", "clip_dim": 16}
    decoder = tiny.decoder_config(text_encoder=text, image_embedding=embedding).model_dump()
    upsampler = tiny.upsampler_config(prediction_type="sample").model_dump()
    tree = {
        "name": "tiny-unclip",
        "clip": clip,
        "priors": {"prior": priors["diffusion_prior"], "ar_prior": priors["autoregressive_prior"]},
        "decoder": preset(folder / "decoder.yaml", encoded, "tiny-decoder", decoder),
        "upsamplers": {
            "upsampler": preset(folder / "upsampler.yaml", shards, "tiny-upsampler", upsampler, caption=None)
        },
        "keep": ["png", "txt"],
        "drawing": {"priors": {"prior": {"num_steps": 2}}, "upsamplers": {"upsampler": {"num_steps": 2}}},
        "register_as": "tiny-unclip",
    }
    path = folder / "unclip.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def trained(stages_preset: str, train: Train, run_root: Path) -> dict[str, Any]:
    """All stages; the first try ends in the middle, as the decoder cannot be built as it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_ROOT", str(run_root))
        wrong = load_stages(stages_preset, ["decoder.data.url=" + str(run_root / "digits")])
        with pytest.raises(BadRequest, match=r"decoder: data.url: .*digits has no clip.npy .*encode_latents.py"):
            train_stages(wrong)
        return train_stages(load_stages(stages_preset, []))


def test_it_goes_on_where_it_ended_and_says_what_is_done(
    trained: dict[str, Any], stages_preset: str, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"clip": "already finished", "prior": "already finished", "ar_prior": "already finished"}
    assert trained["outcomes"] == {**done, "decoder": "trained", "upsampler": "trained"}
    assert [each["written"] for each in trained["encoded"]] == [0] and trained["model_uri"] == "models:/tiny-unclip/1"
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    again = train_stages(load_stages(stages_preset, []))
    assert set(again["outcomes"].values()) == {"already finished"}
    assert again["model_uri"] == trained["model_uri"] and again["export"] == trained["export"]


def test_in_mlflow_each_stage_is_a_child_of_one_run(trained: dict[str, Any]) -> None:
    client = open_client(trained["tracking_uri"])
    parent = client.get_run(trained["mlflow_run_id"])
    assert parent.info.status == "FINISHED" and parent.data.tags["pipeline"] == "unclip"
    for name, stage in trained["stages"].items():
        run = client.get_run(stage["mlflow_run_id"])
        assert run.data.tags["mlflow.parentRunId"] == trained["mlflow_run_id"], name
    version = client.get_model_version("tiny-unclip", "1")
    assert version.run_id == trained["mlflow_run_id"]
    assert version.tags["clip_digest"] == trained["clip"]["digest"]
    for name, stage in trained["stages"].items():
        assert version.tags[f"parent.{name}"].startswith(str(stage["model_uri"]))


def test_every_stage_and_the_whole_draw_from_the_registry(
    trained: dict[str, Any], run_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    mlflow.set_tracking_uri(trained["tracking_uri"])
    frame = pd.DataFrame({"prompt": ["a red seven", "blue 3"], "seed": [1, 2], "num_steps": [2, 2]})
    drawn = mlflow.pyfunc.load_model(trained["model_uri"]).predict(frame)["png"]
    assert all(png.startswith(b"\x89PNG") for png in drawn) and drawn[0] != drawn[1]
    for name in ("prior", "ar_prior"):
        prior = mlflow.pyfunc.load_model(trained["stages"][name]["model_uri"])
        found = np.array(
            prior.predict(pd.DataFrame({"text": ["a red seven", "blue 3"], "seed": [1, 1]}))["embedding"].tolist()
        )
        assert found.shape == (2, 16) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    from pipelines import generate

    def draw(*arguments: str) -> dict[str, Any]:
        summary = tmp_path / "summary.json"
        told = [
            "generate.py",
            *arguments,
            "--num-steps",
            "2",
            "--out",
            str(tmp_path / "out"),
            "--summary",
            str(summary),
        ]
        monkeypatch.setattr("sys.argv", told)
        generate.main()
        return dict(json.loads(summary.read_text()))

    uri = trained["model_uri"]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "b.png")
    one, other = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    assert len(draw("--model", uri, "a red seven", "--by", "text_embedding")["pictures"]) == 1
    assert len(draw("--model", uri, "--image", one, "--count", "3")["pictures"]) == 3
    assert len(draw("--model", uri, "--image", one, "--to", other, "--count", "4")["pictures"]) == 4
    texts = ("--from-text", "a red 7", "--to-text", "a blue 7")
    assert len(draw("--model", uri, "--image", one, *texts, "--count", "2")["pictures"]) == 2
    decoder, upsampler = (trained["stages"][name]["model_uri"] for name in ("decoder", "upsampler"))
    assert len(draw("--model", decoder, "--image", one, "--count", "2")["pictures"]) == 2
    assert len(draw("--model", decoder, "a red seven")["pictures"]) == 1
    assert len(draw("--model", upsampler, "--image", one, "--count", "1", "--guidance-scale", "1")["pictures"]) == 1
    Image.new("RGB", (30, 20)).save(tmp_path / "wide.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    for wrong, match in (
        (("--model", uri, "--image", str(tmp_path / "wide.png")), "square and at least 16 pixels a side, not 30 by 20"),
        (("--model", uri, "--image", str(tmp_path / "small.png")), "square and at least 16 pixels a side, not 8 by 8"),
        (("--model", uri, "zebra " * 30), "this CLIP reads 12: shorten it"),
        (("--model", uri, "a red seven", "--by", "magic"), "no 'magic' in this model to draw by"),
        (("--model", uri, "--image", one, "a prompt"), "--image of unCLIP takes no prompts"),
        (("--model", uri, "--to", other, "a prompt"), "name it with --image"),
        (("--model", uri, "--image", one, "--to", other, "--seeds", "1,2"), "drawn from one seed; give one"),
        (("--model", uri, "--image", one, "--seeds", str(2**63)), "at most 63 bits"),
        (("--model", uri, "--image", one, "--from-text", "a"), "--from-text and --to-text go together"),
        (("--model", decoder, "a red seven", "--by", "prior"), "--by is of models of all stages"),
    ):
        with pytest.raises(BadRequest, match=match):
            draw(*wrong)


def test_stages_that_do_not_fit_are_refused_before_anything_starts(stages_preset: str) -> None:
    tree = yaml.safe_load(Path(stages_preset).read_text())
    for overrides, match in (
        (["decoder.objective.image_size=16"], "upsampler: makes 16 pixels of 8, and decoder draws 16"),
        (["decoder.objective.image_embedding=null"], "decoder: is told no image embeddings"),
        (["prior.objective.clip=models:/other"], "the stages name different CLIPs: prior: models:/other"),
        (["prior.objective.layers=none"], "prior: objective"),
        (["decoder.rum.steps=3"], "decoder: unknown key rum"),
        (["priors={}"], "clip and priors go together"),
        (["clip=null", "priors={}", "drawing.priors={}"], "decoder: is told image embeddings, and there is no prior"),
        (["drawing.priors.best.num_steps=3"], "drawing.priors: there is no best"),
        ([f"decoder={tree['clip']}"], "decoder: trains objective.kind=clip"),
        (["upsamplers={upsampler: " + tree["clip"] + "}"], "upsampler: trains objective.kind=clip"),
        (["drawing.priors.ar_prior.num_steps=3"], "num_steps and candidates are of diffusion priors"),
        (["decoder=nothing"], "there is no preset 'nothing'"),
        (["keep=[txt]"], "decoder: reads images beside their embeddings, and keep=txt leaves them out"),
        (["keep=[png]"], "prior: reads captions from txt, which keep=png leaves out"),
        (["drawing.upsamplers.upsampler.augmentation_level=0.7"], r"drawing.upsamplers.upsampler: .* 0.7 is more than"),
        (["prior.run.name=tiny-decoder"], "tiny-decoder names several folders of runs"),
        (["name=tiny-clip"], "tiny-clip names several folders of runs"),
        (["drawing.decoder.num_steps=5000"], r"drawing.decoder.num_steps=5000: it was trained with \d+ timesteps"),
        (
            [
                "drawing.upsamplers.upsampler={augmentation: truncated, augmentation_level: 0.1}",
                "drawing.decoder.sampler=euler",
            ],
            "drawing.upsamplers.upsampler: truncated augmentation takes sampler ddpm, ddim",
        ),
        (["clip=clip_demo"], "clip=clip_demo is trained, and prior stands on another: preset:"),
        (
            ["clip=null", "trained_clip={path: a, data_url: b}", "clip.run.steps=3"],
            "clip.run.steps=3: no CLIP is trained here",
        ),
        (["trained_clip={path: a, data_url: b}"], "clip is trained first, trained_clip is taken as it is: give one"),
    ):
        with pytest.raises(BadRequest, match=match):
            load_stages(stages_preset, overrides)


def test_stages_name_the_run_of_a_clip_that_is_trained_otherwise_than_its_preset(stages_preset: str) -> None:
    clip = yaml.safe_load(Path(stages_preset).read_text())["clip"]

    def told(*overrides: str) -> set[str]:
        trainings = load_stages(stages_preset, list(overrides)).trainings
        decoder: Any = trainings["decoder"].objective
        return {trainings["prior"].objective.clip, decoder.image_embedding.clip}

    assert told() == told("clip.run.log_every=5") == {f"preset:{clip}"}
    for other in ("clip.run.steps=5", "clip.optimizer.learning_rate=0.5", "clip.run.name=renamed"):
        assert told(other) == {"renamed" if "renamed" in other else "tiny-clip"}


def test_a_trained_clip_takes_the_place_of_the_presets_own_everywhere(
    stages_preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_ROOT", str(tmp_path))
    tree = yaml.safe_load(Path(stages_preset).read_text())
    reads = f"decoder.objective.text_encoder={{kind: pretrained, path: 'preset:{tree['clip']}'}}"
    stages = load_stages(stages_preset, ["clip=null", "trained_clip={path: a, data_url: b}", reads])
    assert "clip" not in stages.trainings
    for training in stages.trainings.values():
        assert "preset:" not in training.model_dump_json()
    decoder: Any = stages.trainings["decoder"].objective
    assert decoder.text_encoder.path == decoder.image_embedding.clip
    assert decoder.image_embedding.clip.endswith("/tiny-unclip/clip")


def test_shards_with_embeddings_hold_the_same_keys_and_a_missing_one_is_made_again(
    trained: dict[str, Any], run_root: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    folder, source = run_root / "digits-clip", run_root / "digits"
    clip = open_clip(trained["stages"]["clip"]["export"])
    assert read_encoders(str(folder))[CLIP_MEMBER]["digest"] == clip.digest
    new, old = (load_index(str(each)) for each in (folder, source))
    assert new.names == old.names and new.samples == old.samples

    def members(index: Any) -> list[tuple[str, dict[str, bytes]]]:
        found = []
        for shard in range(len(index.names)):
            for chunk in range(-(-int(index.shard_samples[shard]) // index.chunk_samples)):
                read = read_chunks(index, [(shard, chunk)])[shard, chunk]
                found += [(sample.key, read.members(place)) for place, sample in enumerate(read.samples)]
        return found

    before, after = members(old), members(new)
    assert [key for key, _ in before] == [key for key, _ in after]
    for (_, given), (_, made) in zip(before, after, strict=True):
        assert set(made) == {"png", "txt", CLIP_MEMBER} and made["png"] == given["png"] and made["txt"] == given["txt"]
    encoders = Encoders(clip, None, 0, ("png", "txt"))
    kept = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    for path in folder.glob("00001.tar*"):
        path.unlink()
    assert encode(str(source), str(folder), encoders)["written"] == 1
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == kept
    assert encode(str(source), str(folder), encoders)["written"] == 0
    with pytest.raises(BadRequest, match=r"holds shards of another request .*keep"):
        encode(str(source), str(folder), Encoders(clip, None, 0, ("txt",)))
    with pytest.raises(BadRequest, match="a folder of their own"):
        encode(str(source), str(source), encoders)
    shutil.copytree(source, tmp_path / "others")
    with pytest.raises(BadRequest, match="holds other shards"):
        encode(str(source), str(tmp_path / "others"), encoders)


def test_embeddings_of_another_clip_are_refused_with_both_digests(
    trained: dict[str, Any], stages_preset: str, train: Train, run_root: Path
) -> None:
    tree = yaml.safe_load(Path(stages_preset).read_text())
    made = read_encoders(str(run_root / "digits-clip"))[CLIP_MEMBER]["digest"]
    other = train("run.name=other-clip", "run.seed=1", "tracking.register_as=null", preset=Path(tree["clip"]))
    with pytest.raises(BadRequest, match=f"clip.npy was made by another model: digest is {made} there and"):
        train("run.name=stranger", f"objective.clip={other['run_folder']}", preset=Path(tree["priors"]["prior"]))


def test_a_clip_of_transformers_is_taken_from_its_folder_and_measured(
    stages_preset: str, train: Train, tmp_path: Path, trained: dict[str, Any], run_root: Path
) -> None:
    """A decoder whose embeddings are made as the images come, by a CLIPModel that this project did not train."""
    tree = yaml.safe_load(Path(stages_preset).read_text())
    folder = resolve_model(trained["stages"]["clip"]["export"])
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    shutil.copytree(folder / "tokenizer", inputs / "tokenizer")
    plain = tiny.write_clip(tmp_path / "plain", inputs, image_encoder=TRANSFORMER)
    for name in ("clip.json", "statistics.safetensors"):
        (plain / name).unlink()
    summary = train(
        "run.name=on-the-fly",
        f"data.url={run_root / 'digits'}",
        f"objective.image_embedding.clip={plain}",
        "objective.image_embedding.member=null",
        "tracking.register_as=null",
        preset=Path(tree["decoder"]),
    )
    clip = FrozenClip.from_folder(Path(RunFolder(summary["run_folder"]).path("inputs", "clip")))
    assert clip.statistics is not None and clip.statistics.count == 64
    told = json.loads((Path(summary["export"]) / "genmodels.json").read_text())["image_embedding"]["clip"]
    assert told["digest"] == clip.digest and summary["outcome"] == "trained"


def test_all_stages_stand_on_a_clip_that_was_trained_elsewhere(
    stages_preset: str, s3: dict[str, str], tmp_path: Path, trained: dict[str, Any], run_root: Path, monkeypatch: Any
) -> None:
    """A CLIPModel without statistics: copied, measured once, and the same for stages that read embeddings from shards
    and one that makes them as the images come."""
    monkeypatch.setenv("RUN_ROOT", str(run_root))
    inputs, source = tmp_path / "inputs", str(run_root / "digits")
    inputs.mkdir()
    shutil.copytree(resolve_model(trained["stages"]["clip"]["export"]) / "tokenizer", inputs / "tokenizer")
    plain = tiny.write_clip(tmp_path / "plain", inputs, image_encoder=TRANSFORMER)
    for name in ("clip.json", "statistics.safetensors"):
        (plain / name).unlink()
    tree = yaml.safe_load(Path(stages_preset).read_text())
    tree |= {"name": "tiny-elsewhere", "clip": None, "priors": {"prior": tree["priors"]["prior"]}, "keep": ["txt"]}
    tree |= {"drawing": {}, "upsamplers": {}, "register_as": None}
    tree["trained_clip"] = {"path": str(plain), "data_url": source, "samples": 64}
    path = tmp_path / "elsewhere.yaml"
    path.write_text(yaml.safe_dump(tree))
    encoded = str(run_root / "digits-elsewhere")
    overrides = [
        *(f"{name}.run.name=elsewhere-{name}" for name in ("prior", "decoder")),
        *(f"{name}.tracking.register_as=null" for name in ("prior", "decoder")),
        f"prior.data.url={encoded}",
        f"decoder.data.url={source}",
        "decoder.objective.image_embedding.member=null",
    ]
    summary = train_stages(load_stages(str(path), overrides))
    assert summary["outcomes"] == {"prior": "trained", "decoder": "trained"}
    assert [each["url"] for each in summary["encoded"]] == [encoded]
    clip = FrozenClip.from_folder(run_root / "tiny-elsewhere" / "clip")
    assert clip.statistics is not None and clip.statistics.count == 64
    assert summary["clip"] == json.loads(json.dumps(clip.describe()))
    assert load_index(encoded).samples == summary["samples"]
    # Shards that keep no images: measured on the embeddings in them.
    bare = FrozenClip.from_folder(plain)
    assert bare.statistics is None and bare.digest == clip.digest
    found = measure_statistics(bare, load_index(encoded), "txt", 64, CLIP_MEMBER)
    torch.testing.assert_close(found.covariance, clip.statistics.covariance, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.mean, clip.statistics.mean, atol=1e-6, rtol=1e-4)
    assert found.dot_mean == pytest.approx(clip.statistics.dot_mean, abs=1e-5)
    with pytest.raises(BadRequest, match=r"cannot be measured .*clip.npy: missing"):
        measure_statistics(bare, load_index(source), "txt", 64, CLIP_MEMBER)
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    # It is copied once, and to object storage too; what is there is not exchanged for another.
    asked, index = {"path": str(plain), "caption": "txt", "samples": 64}, load_index(source)
    placed = place_clip(asked, "s3://data/placed/clip", str(run_root), None, index)
    for reference in (placed, str(plain)):
        assert open_clip(reference).digest == clip.digest
    shutil.rmtree(plain)
    assert place_clip(asked, placed, str(run_root), None, index) == placed
    with pytest.raises(BadRequest, match=r"copied for another request \(samples: 64 → 32\)"):
        place_clip({**asked, "samples": 32}, placed, str(run_root), None, index)
    # Shards that hold all that is wanted, and more, are taken as they are.
    enough = load_stages(stages_preset, ["keep=[txt]", "decoder.data.url=" + source])
    export = trained["stages"]["clip"]["export"]
    assert [each["written"] for each in encode_for(enough, export, source, None)] == [0]
    stranger = load_stages(stages_preset, ["keep=[txt, json]", "decoder.data.url=" + source])
    with pytest.raises(BadRequest, match=r"holds shards of another request \(other keep"):
        encode_for(stranger, export, source, None)
    tree["trained_clip"]["path"] = str(tmp_path / "nowhere")
    path.write_text(yaml.safe_dump({**tree, "name": "tiny-nowhere"}))
    with pytest.raises(BadRequest, match=r"trained_clip: .*nowhere"):
        train_stages(load_stages(str(path), overrides))
