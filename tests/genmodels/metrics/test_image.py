import math

import pytest
import torch

from genmodels.metrics.image import psnr


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
