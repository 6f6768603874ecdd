"""Images of many sizes: the original size and the place of the crop are told, and asked for when drawing."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from genmodels.diffusion.network import size_features
from genmodels.diffusion.pipeline import TextToImage
from genmodels.families import build_objective
from tests.genmodels import tiny

DENOISERS = {
    "unet": tiny.UNET,
    "dit": {"kind": "dit", "width": 16, "depth": 1, "heads": 2},
    "joint": {"kind": "dit", "width": 16, "depth": 1, "heads": 2, "text_attention": "joint"},
}


def test_features_are_sines_and_cosines_of_each_number():
    features = size_features(torch.tensor([[480, 640, 0, 7], [1, 2, 3, 4]])).view(2, 4, 256)
    frequencies = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
    expected = [math.cos(640 * f) for f in frequencies] + [math.sin(640 * f) for f in frequencies]
    torch.testing.assert_close(features[0, 1], torch.tensor(expected), atol=1e-4, rtol=0)
    assert (features[0, 2, :128] == 1).all() and (features[0, 2, 128:] == 0).all()


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_sizes_are_learnt_from_and_drawn_with(denoiser, tmp_path):
    inputs = tiny.write_inputs(tmp_path / "inputs")
    torch.manual_seed(0)
    config = tiny.diffusion_config(denoiser=DENOISERS[denoiser], size_conditioning=True)
    objective = build_objective(config, inputs)
    for parameter in objective.denoiser.parameters():  # what begins as 0 passes nothing on
        torch.nn.init.normal_(parameter, std=0.1)
    batch = tiny.with_tokens(tiny.batch(2), inputs)
    sizes = torch.tensor([[16, 16, 0, 0], [480, 640, 0, 3]], dtype=torch.int32)
    losses = [objective.loss({**batch, "sizes": each}).loss for each in (sizes, sizes.flip(0))]
    assert losses[0] != losses[1]
    losses[0].backward()
    of_sizes = [p for name, p in objective.denoiser.named_parameters() if "class_embedding" in name or ".size." in name]
    assert len(of_sizes) == 4 and all(p.grad is not None and p.grad.any() for p in of_sizes)
    assert objective.preview({**batch, "sizes": sizes}).images.shape == (2, 3, 16, 16)
    assert objective.flops_per_sample() > 0
    assert objective.export(tmp_path / "out")["layout"] == "own"
    model = TextToImage.from_folder(tmp_path / "out")
    assert model.denoiser.takes_size
    assert model.draw(["a red seven on a white background"], [1], num_steps=2).shape == (1, 16, 16, 3)


def test_a_unet_without_text_has_no_place_for_sizes():
    with pytest.raises(ValidationError, match="of U-Nets with text"):
        tiny.diffusion_config(text_encoder={"kind": "none"}, size_conditioning=True)
    tiny.diffusion_config(text_encoder={"kind": "none"}, size_conditioning=True, denoiser=DENOISERS["dit"])
