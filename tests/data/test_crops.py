import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.decode import BadImage
from tests.helpers.paths import GOLDEN

EXPECTED = load_file(GOLDEN / "crops.safetensors")


def golden(kind: str) -> list[str]:
    return [key for key in EXPECTED if f".{kind}" in key]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


@pytest.mark.parametrize("key", golden("adm"))
def test_adm_crop_has_the_published_bytes(key: str) -> None:
    name, _, size = key.rpartition(".adm")
    image = Image.open(GOLDEN / "images" / f"{name}.png")
    assert np.array_equal(crop(image, Crop("adm", int(size))), EXPECTED[key])


@pytest.mark.parametrize("key", golden("eval224"))
def test_eval_crop_agrees_with_the_published_transform(key: str) -> None:
    image = Image.open(GOLDEN / "images" / f"{key.partition('.')[0]}.png")
    pixels = crop(image, Crop("eval", 224, resize=256)).transpose(2, 0, 1) / np.float32(255)
    mean = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
    std = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
    assert np.abs((pixels - mean) / std - EXPECTED[key]).max() <= 1e-6


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(37, 53), (53, 37), (31, 31), (40, 31), (7, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_eval_crop_equals_torchvision(interpolation, size, mode) -> None:
    image = noise(*size, mode)
    reference = v2.CenterCrop(24)(v2.Resize(31, InterpolationMode(interpolation))(image))
    expected = np.asarray(reference).reshape(24, 24, -1)
    ours = crop(image, Crop("eval", 24, 31, interpolation))
    assert ours.dtype == np.uint8
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(37, 53), (31, 31), (7, 90)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_squash_crop_equals_torchvision_without_the_aspect(interpolation, size, mode) -> None:
    image = noise(*size, mode)
    reference = v2.CenterCrop(24)(v2.Resize((31, 31), InterpolationMode(interpolation))(image))
    ours = crop(image, Crop("squash", 24, 31, interpolation))
    assert np.array_equal(ours, np.asarray(reference).reshape(24, 24, -1))


def test_crop_none_keeps_the_pixels_and_a_channel_axis() -> None:
    image = noise(8, 8, "L")
    assert np.array_equal(crop(image, Crop("none", 8))[:, :, 0], np.asarray(image))


def test_crop_none_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="8 x 8 pixels, got 9 x 8"):
        crop(noise(9, 8), Crop("none", 8))


@pytest.mark.parametrize("wanted", [Crop("eval", 224, 256), Crop("adm", 256)])
def test_a_very_elongated_image_is_bad_instead_of_filling_the_memory(wanted: Crop) -> None:
    with pytest.raises(BadImage, match="too large"):
        crop(noise(60_000, 1), wanted)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Crop("eval", 224, 256), "bilinear 256, crop 224"),
        (Crop("eval", 384, 384, "bicubic"), "bicubic 384, crop 384"),
        (Crop("squash", 384, 384, "bicubic"), "bicubic 384 x 384, crop 384"),
        (Crop("adm", 32), "ADM's centre crop 32"),
        (Crop("none", 8), "none"),
    ],
)
def test_a_crop_is_told_in_words(how: Crop, words: str) -> None:
    assert str(how) == words


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "centre", "size": 8}, "none, eval, squash, adm"),
        ({"kind": "adm", "size": 0}, "at least 1"),
        ({"kind": "eval", "size": 224, "resize": 200}, "resize is 200, below size 224"),
        ({"kind": "squash", "size": 224, "resize": 200}, "resize is 200, below size 224"),
        ({"kind": "eval", "size": 8, "resize": 8, "interpolation": "box"}, "bilinear or bicubic"),
    ],
)
def test_a_wrong_crop_setting_is_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        Crop(**settings)
