import math

import pytest
import torch

from genmodels.metrics.image import ms_ssim, psnr, ssim


def test_psnr_is_known_for_a_constant_error_and_separate_for_each_image():
    images = torch.zeros(3, 3, 8, 8)
    reference = torch.stack([torch.full((3, 8, 8), error) for error in (0.2, 0.02, 0.0)])
    decibels = psnr(images, reference)
    assert decibels[:2].tolist() == pytest.approx([20.0, 40.0], abs=1e-4)
    assert math.isinf(decibels[2])
    assert psnr(images[:1], reference[:1], data_range=1.0).item() == pytest.approx(20 - 20 * math.log10(2), abs=1e-4)


def test_psnr_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="shapes differ"):
        psnr(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("similarity", [ssim, ms_ssim])
@pytest.mark.parametrize("side", [16, 64, 192])
def test_similarity_is_1_for_equal_pictures_and_falls_with_noise(similarity, side):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, side, side, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    assert similarity(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    little, much = similarity(images + 0.1 * noise, images), similarity(images + noise, images)
    assert little.shape == (3,) and (much < little).all() and (little < 0.99).all()
    with pytest.raises(ValueError, match="too small"):
        similarity(images[..., :8], images[..., :8])


def test_two_constants_have_the_structural_similarity_of_their_means():
    # Wang et al. 2004, equation 6, for values in [0, 1] without variance: (2ab + c) / (a² + b² + c), c = 0.01².
    a, b, c = 0.75, 0.625, 0.01**2
    images, reference = torch.full((1, 1, 32, 32), 2 * a - 1), torch.full((1, 1, 32, 32), 2 * b - 1)
    assert ssim(images, reference).item() == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-4)
