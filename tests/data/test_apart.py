"""Decoding in a process of its own: what it returns, and images that end the process."""

import numpy as np
import pytest

from dpt_ray.data.apart import apart, cut
from dpt_ray.data.crops import Crop
from dpt_ray.data.decode import BadImage
from tests.helpers.crashes import CRASHES, crashing
from tests.helpers.images import encoded

CROPS = {"small": Crop("adm", 4), "large": Crop("eval", 8, 8)}


@pytest.fixture
def image():
    return encoded(np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8))


def test_pixels_are_those_of_this_process(image):
    expected = cut(image, CROPS, "RGB")
    with apart(CROPS, "RGB") as pixels_of:
        found = [pixels_of(image) for _ in range(2)]
    for pixels in found:
        assert list(pixels) == list(CROPS)
        assert all(np.array_equal(pixels[name], expected[name]) for name in CROPS)


def test_errors_are_those_of_this_process(image):
    with apart({"none": Crop("none", 5)}, "RGB") as pixels_of:
        with pytest.raises(BadImage) as caught:
            pixels_of(b"")
        assert caught.value.reason == "empty: zero bytes"
        with pytest.raises(ValueError, match="crop kind none needs images of 5 x 5 pixels, got 8 x 9"):
            pixels_of(image)


def test_an_image_that_ends_its_process_is_lost_alone(image, tmp_path, monkeypatch):
    crashing(monkeypatch.setenv, tmp_path)
    with apart(CROPS, "RGB") as pixels_of:
        for reason in ("SIGSEGV", "exit code 3"):
            assert np.array_equal(pixels_of(image)["small"], cut(image, CROPS, "RGB")["small"])
            with pytest.raises(BadImage, match=rf"^its decoder ends the process \({reason}\)$"):
                pixels_of(image + CRASHES[reason])
        with pytest.raises(MemoryError, match="a node without memory"):
            pixels_of(image + CRASHES["SIGKILL"])
