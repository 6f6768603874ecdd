"""Images of every bad kind that real data holds: right pixels, or a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.data.decode import BadImage, decode_image
from tests.pipelines.data.shards import encode


def decode(data: bytes, size: int = 16, **options: object) -> np.ndarray:
    out = np.zeros((3, size, size), np.uint8)
    decode_image(data, size, out, **options)
    return out


def photo(width: int, height: int) -> Image.Image:
    """Smooth, so that all ways of scaling agree."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((np.stack([x, y, 1 - x], -1) * 200 + 20).astype(np.uint8))


def png_of(width: int, height: int, bits: int, colour: int, raw: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_pixels_of_the_wanted_size_pass_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(decode(encode(pixels)), pixels.transpose(2, 0, 1))
    assert np.array_equal(decode(encode(pixels), flip=True), pixels[:, ::-1].transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(640, 430), (430, 640), (33, 16), (8, 5)])
def test_scaled_jpeg_equals_full_decoding(width, height):
    image = photo(width, height)
    side = min(width, height)
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    exact = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC, box=box), np.float64).transpose(2, 0, 1)
    assert np.abs(decode(encode(image, "JPEG", quality=98, subsampling=0)) - exact).mean() < 3
    assert np.abs(decode(encode(image)) - exact).max() <= 1


def test_the_square_lies_where_it_is_put():
    stripes = np.zeros((16, 32, 3), np.uint8)
    stripes[:, 16:] = 255
    data = encode(stripes)
    assert decode(data, place=(0.0, 0.0)).max() == 0
    assert decode(data, place=(1.0, 0.0)).min() == 255
    assert decode(data)[:, :, :8].max() == 0 and decode(data)[:, :, 8:].min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_undone(orientation, kind):
    from PIL import ImageOps

    corner = np.full((64, 64, 3), 255, np.uint8)
    corner[:32, :32] = (200, 0, 0)
    corner[:32, 32:] = (0, 200, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(corner, kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").resize((16, 16)), int)
    assert np.abs(decode(data)[:, ::15, ::15].transpose(1, 2, 0) - upright[::15, ::15]).max() < 12


def test_transparency_shows_white_and_not_the_hidden_colour():
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0], rgba[:8, :, 3] = 250, 255  # red, and below hidden red
    palette = Image.fromarray(rgba).quantize(4)
    for data in (encode(rgba), encode(palette), encode(Image.fromarray(rgba), "WEBP", lossless=True)):
        pixels = decode(data)
        assert tuple(pixels[:, 2, 2]) == (250, 0, 0) and tuple(pixels[:, 14, 2]) == (255, 255, 255)
    grey = Image.merge("LA", [Image.new("L", (16, 16), 10), Image.new("L", (16, 16), 0)])
    assert decode(encode(grey)).min() == 255


def test_cmyk_palette_and_grey_become_rgb():
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    assert np.abs(decode(encode(red.convert("CMYK"), "JPEG", quality=98)).astype(int)[:, 5, 5] - [255, 0, 0]).max() < 6
    assert tuple(decode(encode(red.quantize(2)))[:, 5, 5]) == (255, 0, 0)
    assert tuple(decode(encode(Image.new("L", (16, 16), 77)))[:, 5, 5]) == (77, 77, 77)
    assert tuple(decode(encode(Image.new("L", (16, 16), 77), "JPEG"))[:, 5, 5]) == (77, 77, 77)
    assert tuple(decode(encode(Image.new("1", (16, 16), 1)))[:, 5, 5]) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_cut_off():
    values = np.linspace(0, 65535, 256).astype(">u2").reshape(16, 16)
    raw = b"".join(b"\0" + row.tobytes() for row in values)
    pixels = decode(png_of(16, 16, 16, 0, raw))
    assert np.abs(pixels[0].astype(float) - values.astype(float) / 257).max() <= 0.5


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert tuple(decode(data)[:, 5, 5]) == (255, 0, 0), kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_images_are_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    decode(data)
    with pytest.raises(BadImage, match="image: "):
        decode(data[: len(data) * 6 // 10])


def test_a_bomb_is_refused_before_it_is_decoded():
    import tracemalloc

    data = png_of(13000, 13000, 1, 0, b"\0" * (1626 * 13000))  # 20 KB that would be half a gigabyte
    assert len(data) < 50_000
    tracemalloc.start()
    with pytest.raises(BadImage, match="13000x13000 is more than 64 megapixels"):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"\xff\xd8\xff\xe0nothing", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_has_a_reason(data):
    with pytest.raises(BadImage):
        decode(data)


def test_random_damage_never_escapes_as_another_error():
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        good = encode(photo(40, 30), kind)
        for _ in range(60):
            bad = bytearray(good)
            for at in rng.integers(0, len(bad), 8):
                bad[at] = rng.integers(256)
            try:
                decode(bytes(bad))
            except BadImage as error:
                assert str(error).startswith("image: ") and "\n" not in str(error)
