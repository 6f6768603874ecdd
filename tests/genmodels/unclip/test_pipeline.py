"""All stages together: drawing, variations, interpolation, text differences, and joining what fits alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genmodels.drawing import open_drawing_model
from genmodels.families import build_objective
from genmodels.unclip.join import join
from genmodels.unclip.layout import PartsDoNotFit
from genmodels.unclip.pipeline import TEXT_EMBEDDING, TEXT_ONLY, Unclip, slerp
from tests.genmodels import tiny

PROMPTS, SEEDS = ["a red seven", "blue 3", "a green four"], [1, 2, 3]
QUICK = {"num_steps": 3}


def export(folder: Path, config: Any, inputs: Path) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    made = build_objective(config, inputs)
    made.export(folder)
    return folder


@pytest.fixture(scope="module")
def stages(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of all stages: 8 pixels, and an upsampler to 16."""
    folder = tmp_path_factory.mktemp("stages")
    export(folder / "prior", tiny.prior_config(), inputs)
    export(folder / "ar", tiny.prior_config("autoregressive_prior"), inputs)
    export(folder / "decoder", tiny.decoder_config(noise_schedule="cosine"), inputs)
    export(folder / "up", tiny.upsampler_config(prediction_type="sample", noise_schedule="cosine"), inputs)
    return folder


def joined(stages: Path, folder: Path, **drawing: Any) -> Unclip:
    priors = {"prior": stages / "prior", "ar_prior": stages / "ar"}
    told = {"priors": {"prior": {"num_steps": 3}}, "decoder": QUICK, "upsamplers": {"up": {**QUICK, **drawing}}}
    join(folder, priors, stages / "decoder", {"up": stages / "up"}, told)
    opened = open_drawing_model(folder)
    assert isinstance(opened, Unclip)
    return opened


@pytest.fixture(scope="module")
def model(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Unclip:
    return joined(stages, tmp_path_factory.mktemp("joined") / "unclip", augmentation_level=0.1)


def far(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_a_picture_depends_on_its_prompt_and_seed_alone(model: Unclip) -> None:
    assert model.image_size == 16 and model.conditional
    told: list[float] = []
    drawn = model.draw(PROMPTS, SEEDS, **QUICK, batch_size=2, progress=lambda done, total: told.append(done / total))
    assert drawn.shape == (3, 16, 16, 3) and drawn.dtype == np.uint8
    assert told == sorted(told) and told[-1] == 1
    alone = model.draw(PROMPTS[2:], SEEDS[2:], **QUICK)
    assert far(alone[0], drawn[2]) <= 1
    assert far(model.draw(PROMPTS, [1, 2, 4], **QUICK)[2], drawn[2]) > 1
    assert far(model.draw(["a red seven", "blue 3", "a green 8"], SEEDS, **QUICK)[2], drawn[2]) > 1


def test_each_way_from_a_sentence_to_an_embedding_draws_differently(model: Unclip) -> None:
    ways: list[str | None] = [None, "ar_prior", TEXT_EMBEDDING, TEXT_ONLY]
    drawn = [model.draw(PROMPTS, SEEDS, **QUICK, by=way) for way in ways]
    drawn.append(model.draw(PROMPTS, SEEDS, **QUICK, tell_captions=False))
    assert drawn[0].tobytes() == model.draw(PROMPTS, SEEDS, **QUICK, by="prior").tobytes()
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert far(one, other) > 1
    embeddings = model.clip.read_texts(model.clip.tokens(PROMPTS))[2]
    told = {**QUICK, "guidance_scale": 2.0, "sampler": "ddim"}
    by_hand = model.decode(embeddings, [""] * 3, SEEDS, drawing=told)
    assert far(model.draw(PROMPTS, SEEDS, **QUICK, by=TEXT_EMBEDDING, tell_captions=False), by_hand) == 0
    with pytest.raises(ValueError, match="no 'best' in this model to draw by, only prior, ar_prior, text_embedding"):
        model.draw(PROMPTS, SEEDS, by="best")


def test_what_is_not_asked_for_is_drawn_as_the_model_says(stages: Path, tmp_path: Path) -> None:
    priors, own = {"prior": stages / "prior"}, {"num_steps": 4, "guidance_scale": 3.5, "sampler": "dpm_solver++"}
    join(tmp_path / "own", priors, stages / "decoder", {"up": stages / "up"}, {"decoder": own})
    model: Any = open_drawing_model(tmp_path / "own")
    drawn = model.draw(PROMPTS, SEEDS)
    assert drawn.tobytes() == model.draw(PROMPTS, SEEDS, **own).tobytes()
    for other in ({"num_steps": 3}, {"guidance_scale": 1.0}, {"sampler": "ddim"}):
        assert far(model.draw(PROMPTS, SEEDS, **other), drawn) > 1


def test_what_is_steered_away_from_matters(model: Unclip) -> None:
    plain = model.draw(PROMPTS, SEEDS, **QUICK)
    assert far(model.draw(PROMPTS, SEEDS, ["blue 3"] * 3, **QUICK), plain) > 1


def test_variations_interpolation_and_text_differences_begin_and_end_where_they_should(model: Unclip) -> None:
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 20, 20, 3), np.uint8)
    alike = model.variations(np.stack([one, one, other]), [1, 2, 1])
    assert far(alike[0], alike[1]) > 1 and far(alike[0], alike[2]) > 1
    path = model.interpolate(one, other, 5, seed=1)
    assert path.shape == (5, 16, 16, 3)
    assert far(path[0], alike[0]) <= 1 and far(path[-1], alike[2]) <= 1
    turned = model.text_difference(one, "a red seven", "blue 3", 3, seed=1)
    assert far(turned[0], alike[0]) <= 1 and far(turned[2], turned[0]) > 1


def test_slerp_is_the_arc() -> None:
    one, other = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    found = slerp(one, other, torch.tensor([0.5, 1 / 3, 0.5]))
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [3**0.5 / 2, 0.5], [1.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_truncated_augmentation_hands_on_what_is_still_noisy(stages: Path, tmp_path: Path) -> None:
    many = {"num_steps": 20}
    told = {"augmentation_level": 0.25}
    truncated = joined(stages, tmp_path / "truncated", augmentation="truncated", **told)
    seen: dict[str, Any] = {}
    upsampler = truncated.upsamplers[0].denoiser
    kept = upsampler.predict

    def watch(latents: torch.Tensor, timesteps: torch.Tensor, condition: Any) -> torch.Tensor:
        seen.update(condition)
        return kept(latents, timesteps, condition)

    upsampler.predict = watch  # type: ignore[method-assign]
    drawn = truncated.draw(PROMPTS, SEEDS, **many)
    level = float(seen["level"][0])
    assert 0.1 < level <= 0.26 and (seen["level"] == level).all()
    assert drawn.shape == (3, 16, 16, 3)
    with pytest.raises(ValueError, match="takes sampler ddpm, ddim"):
        truncated.draw(PROMPTS, SEEDS, **many, sampler="euler")
    plain = joined(stages, tmp_path / "plain", **told)
    assert far(plain.draw(PROMPTS, SEEDS, **many), drawn) > 1


def test_a_cascade_reads_captions_alone(stages: Path, inputs: Path, tmp_path: Path) -> None:
    text = export(tmp_path / "text", tiny.diffusion_config(autoencoder=None, image_size=8), inputs)
    index = join(tmp_path / "cascade", {}, text, {"up": stages / "up"}, {"upsamplers": {"up": QUICK}})
    assert index["clip"] is None and not (tmp_path / "cascade" / "clip").exists()
    model: Any = open_drawing_model(tmp_path / "cascade")
    drawn = model.draw(PROMPTS, SEEDS, **QUICK)
    assert drawn.shape == (3, 16, 16, 3) and far(model.draw(PROMPTS[1:2], SEEDS[1:2], **QUICK)[0], drawn[1]) <= 1
    assert far(model.draw([*PROMPTS[:2], "blue 3"], SEEDS, **QUICK)[2], drawn[2]) > 1
    with pytest.raises(ValueError, match="reads captions alone: it has no CLIP"):
        model.variations(np.zeros((1, 20, 20, 3), np.uint8), [1])
    with pytest.raises(ValueError, match="reads no captions, and there is no prior"):
        join(tmp_path / "none", {}, stages / "up", {})


def test_bad_requests_are_one_clear_line(model: Unclip) -> None:
    with pytest.raises(ValueError, match="one prompt per seed: 3 for 2"):
        model.draw(PROMPTS, [1, 2])
    with pytest.raises(ValueError, match="this CLIP reads 12: shorten it"):
        model.draw(["zebra " * 20], [1])
    small = np.zeros((1, 12, 12, 3), np.uint8)
    with pytest.raises(ValueError, match="square and at least 16 pixels a side, not 12 by 12"):
        model.variations(small, [1])
    with pytest.raises(ValueError, match="square and at least 16 pixels a side, not 30 by 20"):
        model.variations(np.zeros((1, 20, 30, 3), np.uint8), [1])
    with pytest.raises(ValueError, match="needs 2 pictures"):
        model.variations(small, [1, 2])


def test_stages_that_do_not_fit_are_refused_with_both_values(stages: Path, inputs: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    shutil.copytree(inputs / "tokenizer", others / "tokenizer")
    tiny.write_clip(others / "clip", inputs, seed=1)
    stranger = export(tmp_path / "stranger", tiny.prior_config(), others)
    digests = [json.loads((each / "prior.json").read_text())["clip"]["digest"] for each in (stages / "prior", stranger)]
    with pytest.raises(PartsDoNotFit, match=f"digest is {digests[1]} of prior and {digests[0]} of decoder"):
        join(tmp_path / "a", {"prior": stranger}, stages / "decoder", {})
    facts = json.loads((stranger / "prior.json").read_text())
    facts["clip"]["embedding_dim"] = 24
    (stranger / "prior.json").write_text(json.dumps(facts))
    with pytest.raises(PartsDoNotFit, match="embedding_dim is 24 of prior and 16 of decoder"):
        join(tmp_path / "b", {"prior": stranger}, stages / "decoder", {})
    large = export(tmp_path / "large", tiny.upsampler_config(image_size=32), inputs)
    with pytest.raises(PartsDoNotFit, match="decoder draws 8 pixels a side, and up takes 16"):
        join(tmp_path / "c", {"prior": stages / "prior"}, stages / "decoder", {"up": large})
    with pytest.raises(ValueError, match="is told image embeddings, so it needs a prior"):
        join(tmp_path / "d", {}, stages / "decoder", {})
    with pytest.raises(ValueError, match="is no prior"):
        join(tmp_path / "e", {"prior": stages / "decoder"}, stages / "decoder", {})
    with pytest.raises(ValueError, match="is told no image embeddings"):
        join(tmp_path / "f", {"prior": stages / "prior"}, stages / "up", {})
    with pytest.raises(ValueError, match=r"up: .* is no upsampler"):
        join(tmp_path / "g", {"prior": stages / "prior"}, stages / "decoder", {"up": stages / "decoder"})
    text = export(tmp_path / "text", tiny.upsampler_config(text_encoder=tiny.TEXT, denoiser=tiny.UNET), inputs)
    with pytest.raises(ValueError, match=r"up: .* an upsampler makes pixels of pixels"):
        join(tmp_path / "i", {"prior": stages / "prior"}, stages / "decoder", {"up": text})
    for name, told, match in (
        ("up", {"augmentation_level": 0.6}, "up: augmentation_level 0.6 is more than it was trained with, .* 0.3"),
        ("up", {"augmentation": "truncated"}, "up: truncated augmentation needs an augmentation_level above 0"),
        ("larger", {"augmentation": "truncated", "augmentation_level": 0.1}, "larger: truncated .* first upsampler"),
    ):
        both = {"up": stages / "up", "larger": large}
        with pytest.raises(ValueError, match=match):
            join(tmp_path / "j", {"prior": stages / "prior"}, stages / "decoder", both, {"upsamplers": {name: told}})
    # Three times the size again: 8, 16, 32.
    join(tmp_path / "h", {"prior": stages / "prior"}, stages / "decoder", {"up": stages / "up", "larger": large})
    assert open_drawing_model(tmp_path / "h").image_size == 32
