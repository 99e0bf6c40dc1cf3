import io
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from dpt_ray.data.decode import BadImage, decode
from dpt_ray.data.listing import FORMATS, IMAGE_SUFFIXES
from tests.helpers.images import encoded

RANDOM = np.random.default_rng(1)
RGB = RANDOM.integers(0, 256, (24, 16, 3), np.uint8)
GREY = RGB[:, :, 0]
ALPHA = RGB[:, :, 1]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))


def test_rgb_is_unchanged() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB))), RGB)


def test_grey_is_repeated_three_times_and_stays_one_channel_in_mode_l() -> None:
    data = encoded(Image.fromarray(GREY))
    assert np.array_equal(pixels(data), np.stack([GREY] * 3, axis=2))
    assert np.array_equal(np.asarray(decode(data, "L")), GREY)


def test_alpha_is_dropped_and_not_blended() -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(np.dstack([RGB, ALPHA])))), RGB)
    grey_alpha = encoded(Image.fromarray(np.dstack([GREY, ALPHA])))
    assert np.array_equal(pixels(grey_alpha), np.stack([GREY] * 3, axis=2))


def test_palette_with_transparency_gives_the_palette_colours() -> None:
    indices = np.arange(4, dtype=np.uint8).reshape(2, 2)
    palette = RANDOM.integers(0, 256, (4, 3), np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette.tobytes())
    data = encoded(image, transparency=2)
    assert np.array_equal(pixels(data), palette[indices])


def test_16_bit_grey_saturates_at_255() -> None:
    values = np.array([[0, 7], [255, 256], [300, 65535]], np.uint16)
    expected = np.minimum(values, 255).astype(np.uint8)
    assert np.array_equal(pixels(encoded(Image.fromarray(values))), np.stack([expected] * 3, 2))


def test_cmyk_jpeg_becomes_rgb() -> None:
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:, :] = (255, 0, 0, 0)  # cyan ink alone: no red light
    data = encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)
    assert np.abs(pixels(data).astype(int) - (0, 255, 255)).max() <= 2


def test_exif_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    data = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert pixels(data).shape == (24, 16, 3)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_the_bytes_decide_the_format_and_lossless_ones_keep_every_pixel(format) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB), format, **options)), RGB)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_what_is_an_image_by_its_suffix_is_of_a_format_that_is_decoded(suffix) -> None:
    Image.init()  # Pillow's own table of suffixes
    assert Image.EXTENSION[suffix] in FORMATS
    Image.fromarray(GREY).save(buffer := io.BytesIO(), Image.EXTENSION[suffix])
    assert decode(buffer.getvalue()).size == (16, 24)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("P", (4, 4), i) for i in (0, 1)]
    for frame in frames:
        frame.putpalette([10, 20, 30, 200, 210, 220])
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(pixels(data), np.full((4, 4, 3), (10, 20, 30)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("kept", [1, 20, 0.5, 0.9])
def test_a_truncated_image_is_bad(format, kept) -> None:
    data = encoded(Image.fromarray(RGB), format)
    with pytest.raises(BadImage):
        decode(data[: kept if kept >= 1 else int(len(data) * kept)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>404 not found</html>" * 10, "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        (bytes(1000), "not an image"),
    ],
)
def test_what_is_no_image_is_bad_for_a_stable_reason(data, reason) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert reason in caught.value.reason
    assert "0x" not in caught.value.reason  # a memory address would differ from run to run


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bytes_never_raise_anything_but_bad_image() -> None:
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        data = bytearray(encoded(Image.fromarray(RGB), format))
        for seed in range(60):
            broken = bytearray(data)
            for place in np.random.default_rng(seed).integers(0, len(data), 8):
                broken[place] ^= 0xFF
            with suppress(BadImage):
                decode(bytes(broken))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [24 * 16 - 1, 10])  # PIL itself warns at 1x, refuses at 2x
def test_a_decompression_bomb_is_bad(monkeypatch, limit) -> None:
    data = encoded(Image.fromarray(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16)
    decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadImage):
        decode(data)
