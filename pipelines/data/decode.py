"""From bytes to pixels: one image, cropped to a square, or the reason why it cannot be used.

JPEG is decoded at a reduced scale (DCT scaling) where the image is much larger than wanted: two to three times as fast
as decoding all of it. Everything else, and every JPEG out of the ordinary, goes through Pillow.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 64_000_000  # a 20 KB PNG can hold 13000 x 13000 pixels, half a gigabyte decoded
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
Image.init()
# Named, because Pillow runs an interpreter for some of the others (EPS). AVIF is not in every build.
_FORMATS: list[str] = [
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if name in Image.OPEN
]
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """The image cannot be used; the message is the reason that is recorded."""


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"image: {width}x{height} is more than {MAX_PIXELS // 10**6} megapixels")
    if not width or not height:
        raise BadImage("image: has no pixels")


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels: `_check_size` decides
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    _check_size(*image.size)
    return image


def _over_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion saturates at 255
        values = np.asarray(image, np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"image: values of mode {image.mode} beyond 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("image: floating-point values have no known range")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        return _over_white(image)
    return image.convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _decode_scaled(data: bytes, image_size: int) -> Image.Image | None:
    """A plain JPEG, at the least scale that still covers `image_size`; None where Pillow should look at it."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colorspace in ("CMYK", "YCCK"):
            return None
        pixels = simplejpeg.decode_jpeg(data, min_height=image_size, min_width=image_size, min_factor=1)
    except ValueError:  # also for harmless oddities, which Pillow reads past, while it refuses truncated data
        return None
    orientation = 1
    if b"Exif\0\0" in data[:65536]:
        orientation = int(_open(data).getexif().get(_ORIENTATION, 1))
    return _upright(Image.fromarray(pixels), orientation)


def open_rgb(data: bytes, image_size: int) -> Image.Image:
    """Decode to upright RGB, at least `image_size` on each side where the original is. Raises BadImage."""
    try:
        image = _decode_scaled(data, image_size) if data[:2] == b"\xff\xd8" else None
        if image is None:
            opened = _open(data)
            orientation = int(opened.getexif().get(_ORIENTATION, 1))
            opened.load()  # of an animation: the first frame. Raises where the data is truncated
            image = _upright(_to_rgb(opened), orientation)
        return image
    except BadImage:
        raise
    except Exception as error:
        # Whatever a decoder raises is about these bytes alone, and it ends up in the quarantine's record.
        raise BadImage(f"image: {' '.join(str(error).split())[:120] or type(error).__name__}") from error


def original_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image that was decoded, upright."""
    image = _open(data)
    turned = int(image.getexif().get(_ORIENTATION, 1)) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def decode_image(
    data: bytes,
    image_size: int,
    out: NDArray[np.uint8],
    place: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    nearest: bool = False,
) -> tuple[int, int]:
    """Decode, resize the shorter side to `image_size` (bicubic, antialiased), crop a square, and write it to `out`.

    `out` is uint8 (3, image_size, image_size); `place` is where the square lies along x and y, 0 to 1, 0.5 the centre;
    `flip` mirrors left and right; `nearest` takes the nearest pixel, so that no colour is mixed of others. Returns how
    many pixels of the resized image were cut off at its top and at its left. Raises BadImage with the reason.
    """
    image = open_rgb(data, image_size)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) * place[0], (height - side) * place[1]
    if (width, height) != (image_size, image_size):
        box = (left, top, left + side, top + side)
        resampling = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
        image = image.resize((image_size, image_size), resampling, box=box)
    pixels = np.asarray(image)
    out[...] = (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)
    return round(top * image_size / side), round(left * image_size / side)
