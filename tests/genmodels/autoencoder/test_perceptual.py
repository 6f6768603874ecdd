from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from genmodels.autoencoder.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = PerceptualDistance().requires_grad_(False)
    for layer in network.linear:
        layer.weight.abs_()  # LPIPS weights are not negative
    return network


def test_it_is_a_distance_per_sample_with_a_gradient(network):
    images, others = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    distances = network(images, others)
    assert distances.shape == (2,) and (distances > 0).all()
    assert network(images, images).equal(torch.zeros(2))
    torch.testing.assert_close(distances, network(others, images))
    images.requires_grad_()
    network(images, others).sum().backward()
    assert images.grad.abs().sum() > 0


def test_features_follow_their_definition(network):
    """The first stage by hand: normalised input, two convolutions, unit length along channels."""
    images = torch.rand(1, 3, 16, 16)
    x = (images - torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)) / network.scale
    for index in (0, 2):
        x = torch.relu(network.features[index](x))
    torch.testing.assert_close(network.stages(images)[0], torch.nn.functional.normalize(x, dim=1))
    assert [f.shape[1] for f in network.stages(images)] == [64, 128, 256, 512, 512]


def test_weights_are_read_under_both_names(network, tmp_path):
    state = {**network.state_dict(), "classifier.0.bias": torch.zeros(2)}
    save_file(state, tmp_path / "ours.safetensors")
    renamed = {k.replace("linear.", "lin").replace(".weight", ".model.1.weight") if "linear" in k else k: v
               for k, v in state.items()}  # fmt: skip
    save_file(renamed, tmp_path / "lpips.safetensors")
    images, others = torch.rand(2, 1, 3, 32, 32)
    for name in ("ours", "lpips"):
        again = PerceptualDistance.from_file(tmp_path / f"{name}.safetensors")
        assert again(images, others).equal(network(images, others))
        assert not any(p.requires_grad for p in again.parameters())


def test_missing_or_foreign_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        PerceptualDistance.from_file(tmp_path / "none.safetensors")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="does not hold"):
        PerceptualDistance.from_file(tmp_path / "bad.safetensors")
