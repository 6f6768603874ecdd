import numpy as np
import pytest
from PIL import Image

from pipelines.pictures import grid_png


def pictures(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_small_pictures_are_enlarged_without_smoothing_and_placed_in_reading_order():
    images = pictures(5)
    sheet = np.asarray(grid_png(images, [f"picture {i}" for i in range(5)], columns=3))
    for i, image in enumerate(images):
        enlarged = np.kron(image, np.ones((3, 3, 1), dtype=np.uint8))
        left, tops = 10 + (i % 3) * 106, range(sheet.shape[0] - 95)
        found = [top for top in tops if np.array_equal(sheet[top : top + 96, left : left + 96], enlarged)]
        assert len(found) == 1 and (found[0] > 96) == (i >= 3)


def test_long_titles_wrap_inside_their_column():
    image = np.full((2, 32, 32, 3), 250, dtype=np.uint8)  # the colour of the sheet: what differs is text
    titles = ["someone wrote seven with a magenta pen on yellow paper", "x" * 60]
    sheet = np.asarray(grid_png(image, titles, columns=2)).min(axis=-1)
    assert (sheet[:, 10:106] < 100).any() and (sheet[:, 116:212] < 100).any()
    assert not (sheet[:, 107:115] < 200).any() and not (sheet[:, 213:] < 200).any()
    assert not (sheet[-8:] < 200).any(), "text is cut off at the bottom"


def test_large_pictures_keep_their_size_and_titles_may_be_left_out():
    sheet = grid_png(pictures(2, 128), columns=8)
    assert isinstance(sheet, Image.Image) and sheet.size[0] == 2 * 128 + 3 * 10


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="3 titles for 2 pictures"):
        grid_png(pictures(2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="uint8"):
        grid_png(np.zeros((2, 3, 32, 32), dtype=np.float32))
