"""Generators and discriminators of every kind: sizes, conditions, normalisation, spectral norms, initialisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genmodels import random
from genmodels.gan.build import build_discriminator, build_generator
from genmodels.gan.config import GanConfig
from genmodels.gan.networks.blocks import BatchNorm, Head
from genmodels.gan.networks.style import Equal, Modulated
from tests.processes import on_ranks

KINDS = ("dcgan", "resnet", "modern", "style")
SMALL: dict[str, dict[str, Any]] = {
    "dcgan": {"kind": "dcgan", "channels": 8, "norm": "group"},
    "resnet": {"kind": "resnet", "channels": 8, "largest": 16},
    "modern": {"kind": "modern", "channels": 8, "largest": 16, "blocks": 1, "group_width": 8},
    "style": {"kind": "style", "channels": 8, "largest": 16},
}
STYLE = {"style_dim": 16, "mapping_layers": 2}


def config(kind: str, **changes: Any) -> GanConfig:
    generator = {**SMALL[kind], **(STYLE if kind == "style" else {})}
    settings = {"image_size": 16, "latent_dim": 8, "condition_dim": 16, "generator": generator}
    return GanConfig.model_validate({**settings, "discriminator": SMALL[kind], **changes})


def latents(count: int = 4, dim: int = 8) -> Tensor:
    return random.normal(torch.arange(count), (dim,), "latent")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 16, 64])
def test_pictures_of_every_size_and_a_score_for_each(kind: str, size: int) -> None:
    torch.manual_seed(0)
    chosen = config(kind, image_size=size)
    generator, discriminator = build_generator(chosen), build_discriminator(chosen)
    drawn = generator(latents(), None, torch.arange(4))
    assert drawn.shape == (4, 3, size, size) and drawn.isfinite().all()
    scores = discriminator(drawn)
    assert scores.logits.shape == (4,) and scores.classes is None and scores.features.shape == (4, 16)
    alone = generator(latents()[2:3], None, torch.arange(2, 3))
    torch.testing.assert_close(alone[0], drawn[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_1024_pixels_are_a_matter_of_the_configuration(kind: str) -> None:
    with torch.device("meta"):
        chosen = config(kind, image_size=1024)
        drawn = build_generator(chosen)(torch.empty(1, 8), None, None)
        assert drawn.shape == (1, 3, 1024, 1024) and build_discriminator(chosen)(drawn).logits.shape == (1,)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_change_the_picture_and_the_score(kind: str) -> None:
    torch.manual_seed(0)
    by_class = config(kind, classes=["a", "b", "c"])
    by_text = config(kind, text_encoder={"kind": "pretrained", "path": "nowhere", "width": 12})
    for chosen, one, other in (
        (by_class, torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 2, 0])),
        (by_text, torch.randn(4, 12), None),
    ):
        if other is None:
            other = torch.cat([one[1:2], one[1:]])
        generator, discriminator = build_generator(chosen), build_discriminator(chosen).eval()
        _nothing_is_zero(generator)
        told = [generator(latents(), each, torch.arange(4)) for each in (one, other)]
        assert not torch.allclose(told[0][0], told[1][0], atol=1e-4)
        torch.testing.assert_close(told[0][1:], told[1][1:], atol=1e-5, rtol=1e-4)
        scores = [discriminator(told[0], each).logits for each in (one, other)]
        assert abs(float(scores[0][0] - scores[1][0])) > 1e-4
        torch.testing.assert_close(scores[0][1:], scores[1][1:])


def _nothing_is_zero(module: nn.Module) -> None:
    """What begins at zero, so that it adds nothing at first, is moved."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)


@pytest.mark.parametrize("kind", ["dcgan", "resnet"])
def test_the_largest_singular_value_of_each_layer_is_1(kind: str) -> None:
    torch.manual_seed(0)
    told = {"classes": ["a", "b", "c"], "auxiliary_weight": 1.0}
    discriminator = build_discriminator(config(kind, discriminator={**SMALL[kind], "spectral_norm": True}, **told))
    for _ in range(200):  # one step of the power iteration each
        discriminator(torch.randn(2, 3, 16, 16), torch.tensor([0, 2]))
    discriminator.eval()
    layers = [m for m in discriminator.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    assert {type(layer).__name__.removeprefix("Parametrized") for layer in layers} == {"Conv2d", "Linear", "Embedding"}
    for layer in layers:
        assert isinstance(layer.weight, torch.Tensor)
        value = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(value) == pytest.approx(1, abs=5e-3)


def test_k_plus_1_classes_give_the_score() -> None:
    """Salimans et al. 2016, section 5: D(x) = Z/(Z + 1), Z the sum of the exponentials of the classes' logits."""
    head = Head(6, None, classes=3, joint=True)
    found = head(torch.randn(5, 6), None)
    assert found.classes is not None
    z = found.classes.exp().sum(1)
    torch.testing.assert_close(found.logits.sigmoid(), z / (z + 1))


def test_modulation_of_the_input_is_modulation_of_the_weights() -> None:
    """Karras et al. 2020, eq. 1 and 3, by weights of each sample."""
    torch.manual_seed(0)
    layer, x, styles = Modulated(4, 6, 3, 5), torch.randn(3, 4, 8, 8), torch.randn(3, 5)
    scale = layer.style(styles)
    expected = []
    for image, own in zip(x, scale, strict=True):
        weight = layer.weight / 36**0.5 * own[None, :, None, None]
        weight = weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        expected.append(nn.functional.conv2d(image[None], weight, padding=1)[0])
    torch.testing.assert_close(layer(x, styles), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_at_first_features_keep_their_size() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    assert float(Equal(256, 128)(x).detach().std()) == pytest.approx(1, abs=0.05)
    generator = build_generator(config("modern"))
    for stage in generator.stages:  # type: ignore[union-attr, attr-defined]
        for block in stage.blocks:
            given = torch.randn(2, block.one.in_channels, 4, 4)
            assert block(given).equal(given), "a residual block begins as the identity"


def _batch_norm(rank: int, world_size: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    norm, reference = BatchNorm(3), nn.BatchNorm2d(3)
    whole = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 + 1
    share = 8 // world_size
    mine = whole[rank * share : (rank + 1) * share].clone().requires_grad_()
    out = norm(mine)
    (out.sin().sum()).backward()
    given = whole.clone().requires_grad_()
    wanted = reference(given)
    wanted.sin().sum().backward()
    assert mine.grad is not None and given.grad is not None
    part = slice(rank * share, (rank + 1) * share)
    torch.testing.assert_close(out, wanted[part], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.grad, given.grad[part], atol=1e-5, rtol=1e-4)
    return {"mean": norm.running_mean, "variance": norm.running_var, "wanted": reference.running_mean}


def test_batch_statistics_follow_the_images_of_ones_own_phase_alone() -> None:
    norm = BatchNorm(4)
    norm(torch.randn(8, 4, 2, 2))
    known = norm.running_mean.clone()
    norm.requires_grad_(False)  # as in the other network's phase
    norm((torch.randn(8, 4, 2, 2) + 9).requires_grad_())
    assert norm.running_mean.equal(known) and known.any()


@pytest.mark.slow
def test_batch_statistics_are_those_of_all_ranks_and_equal_on_all() -> None:
    for world_size in (1, 2):
        found = on_ranks(world_size, _batch_norm)
        for each in found:
            assert each["mean"].equal(found[0]["mean"]) and each["variance"].equal(found[0]["variance"])
            torch.testing.assert_close(each["mean"], each["wanted"])
