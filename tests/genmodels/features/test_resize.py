import numpy as np
import pytest
from PIL import Image

from genmodels.features.resize import resize


@pytest.mark.parametrize(("height", "width"), [(13, 13), (64, 48), (40, 20)])
def test_each_channel_is_pillows_bicubic_in_floats(height, width):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 37, 29, 3), dtype=np.uint8)
    found = resize(pictures, height, width)
    assert found.shape == (2, height, width, 3) and found.dtype == np.float32
    for picture, resized in zip(pictures, found):
        for channel in range(3):
            image = Image.fromarray(picture[..., channel].astype(np.float32))
            expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_array_equal(resized[..., channel], expected)


def test_fine_stripes_become_grey_and_not_other_stripes():
    pictures = np.zeros((1, 90, 90, 3), np.uint8)
    pictures[:, :, ::2] = 255
    inside = resize(pictures, 31)[:, :, 3:-3]
    assert np.abs(inside - 127.5).max() < 20  # nearest pixels alone would give 0 and 255
    assert (resize(pictures, 90) == pictures).all()


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        resize(np.zeros((1, 8, 8, 3), np.float32), 4)
    with pytest.raises(ValueError, match="uint8"):
        resize(np.zeros((8, 8, 3), np.uint8), 4)
