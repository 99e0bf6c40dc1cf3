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
    [expected] = cut([image], CROPS, "RGB")
    with apart(CROPS, "RGB") as pixels_of:
        found = [pixels for _ in range(2) for pixels in pixels_of([image, image])]
    assert len(found) == 4
    for pixels in found:
        assert list(pixels) == list(CROPS)
        assert all(np.array_equal(pixels[name], expected[name]) for name in CROPS)


def test_what_cannot_be_used_is_what_it_is_in_this_process(image):
    with apart({"none": Crop("none", 5)}, "RGB") as pixels_of:
        bad, wrong = pixels_of([b"", image])
    assert isinstance(bad, BadImage) and bad.reason == "empty: zero bytes"
    assert isinstance(wrong, ValueError) and not isinstance(wrong, BadImage)
    assert "crop kind none needs images of 5 x 5 pixels, got 8 x 9" in str(wrong)


def test_an_image_that_ends_its_process_is_lost_alone(image, tmp_path, monkeypatch):
    crashing(monkeypatch.setenv, tmp_path)
    [expected] = cut([image], CROPS, "RGB")
    with apart(CROPS, "RGB") as pixels_of:
        for reason in ("SIGSEGV", "exit code 3"):
            before, crashed, after = pixels_of([image, image + CRASHES[reason], image])
            assert str(crashed) == f"its decoder ends the process ({reason})"
            assert isinstance(crashed, BadImage)
            for pixels in (before, after):
                assert np.array_equal(pixels["small"], expected["small"])
        _, killed, after = pixels_of([image, image + CRASHES["SIGKILL"], image])
        assert isinstance(killed, MemoryError) and "a node without memory" in str(killed)
        assert np.array_equal(after["small"], expected["small"])
