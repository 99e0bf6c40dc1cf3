import colorsys

import pytest
import torch

from dpt_ray.learners import photographs
from dpt_ray.learners.augmentations import VIEWS
from dpt_ray.learners.photographs import LUMA, photograph_view
from dpt_ray.training.random import StepRandom

N = 256
GREY_PIXELS = torch.zeros(8, 3, 8, 8)


def colours(n: int = N, side: int = 8) -> torch.Tensor:
    """An image of one colour each, between 0.3 and 0.7 so that nothing is clipped."""
    generator = torch.Generator().manual_seed(0)
    rgb = 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=generator)
    return (2 * rgb - 1).expand(-1, -1, side, side)


def ramps(n: int = N) -> torch.Tensor:
    """Images whose red is the column, green the row, and blue neither."""
    ramp = (torch.arange(32) + 0.5) / 16 - 1
    image = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32)])
    return image.expand(n, -1, -1, -1)


def fixed(monkeypatch, **values: float) -> None:
    """Have every view drawn from these numbers, and from 1/2 (no change) else."""
    names = (
        "area",
        "aspect",
        "x",
        "y",
        "flip",
        "jitter",
        "grey",
        "brightness",
        "contrast",
        "saturation",
        "hue",
    )
    numbers = torch.tensor([values.get(name, 0.5) for name in names])
    monkeypatch.setattr(
        StepRandom, "uniform", lambda self, name, shape: numbers.expand(self.hi - self.lo, -1)
    )


def luma(images: torch.Tensor) -> torch.Tensor:
    return torch.einsum("c,bchw->bhw", torch.tensor(LUMA), (images + 1) / 2)


def view(images: torch.Tensor, strength: float = 1.0, name: str = "a") -> torch.Tensor:
    return photograph_view(images, StepRandom(0, 0, 0, len(images)), name, strength)


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_belongs_to_its_position_and_name(kind):
    images = colours(16) + ramps(16)[..., :8, :8] / 4
    whole = VIEWS[kind](images, StepRandom(0, 0, 0, 16), "a", 1.0)
    parts = [VIEWS[kind](images[i : i + 8], StepRandom(0, 0, i, i + 8), "a", 1.0) for i in (0, 8)]
    torch.testing.assert_close(whole, torch.cat(parts))
    assert not torch.allclose(whole, VIEWS[kind](images, StepRandom(0, 0, 0, 16), "b", 1.0))


def test_crops_have_the_papers_areas_and_ratios_and_half_are_mirrored(monkeypatch):
    monkeypatch.setattr(photographs, "GREY", 0.0)
    views = view(ramps(2048), strength=0)
    slope_x = (views[:, 0, 16, 17] - views[:, 0, 16, 15]) * 8  # in image sides a view's side
    slope_y = (views[:, 1, 17, 16] - views[:, 1, 15, 16]) * 8
    area, ratio = slope_x.abs() * slope_y, slope_x.abs() / slope_y
    assert area.min() > 0.07 and area.max() < 1.001
    assert area.median() == pytest.approx(0.54, abs=0.05)
    inside = area < 0.7  # larger ones may touch both sides
    assert ratio[inside].min() > 0.74 and ratio[inside].max() < 1.35
    assert (slope_x < 0).float().mean() == pytest.approx(0.5, abs=0.05)
    # A crop stays inside its image, and reaches all sides.
    assert views.min() >= -1 and views.max() <= 1
    assert views[:, 0].amin() < -0.9 and views[:, 0].amax() > 0.9


def test_the_whole_image_is_the_image(monkeypatch):
    fixed(monkeypatch, area=1.0)
    torch.testing.assert_close(view(ramps(8)), ramps(8), rtol=0, atol=1e-5)


def test_brightness_and_contrast_are_their_definitions(monkeypatch):
    images = ramps(8) / 4
    fixed(monkeypatch, area=1.0, brightness=0.75)  # half of the way to + 0.4
    torch.testing.assert_close(view(images), (images + 1) * 1.2 - 1, rtol=0, atol=1e-5)
    fixed(monkeypatch, area=1.0, contrast=0.25)
    mean = 2 * luma(images).mean((1, 2))[:, None, None, None] - 1
    torch.testing.assert_close(view(images), 0.8 * images + 0.2 * mean, rtol=0, atol=1e-5)


def test_saturation_and_grey_keep_the_luma(monkeypatch):
    images = colours(8)
    grey = (2 * luma(images) - 1)[:, None].expand_as(images)
    fixed(monkeypatch, area=1.0, saturation=0.25)
    torch.testing.assert_close(view(images), 0.8 * images + 0.2 * grey, rtol=0, atol=1e-5)
    fixed(monkeypatch, area=1.0, grey=0.1)
    torch.testing.assert_close(view(images), grey, rtol=0, atol=1e-5)


def test_hue_turns_the_colour_and_keeps_the_luma(monkeypatch):
    images = colours(8)
    fixed(monkeypatch, area=1.0, hue=1.0)
    turned = view(images)
    torch.testing.assert_close(luma(turned), luma(images), rtol=0, atol=1e-5)
    for before, after in zip(images[..., 0, 0], turned[..., 0, 0], strict=True):
        hues = [colorsys.rgb_to_hsv(*((colour + 1) / 2).tolist())[0] for colour in (before, after)]
        # A tenth of a turn; the colour circle of HSV is not quite that of luma and two differences.
        assert 0.04 < min((hues[0] - hues[1]) % 1, (hues[1] - hues[0]) % 1) < 0.17


def test_as_many_views_as_in_the_paper_are_changed_in_colour_and_grey():
    views = view(colours(2048))
    pixel = views[..., 0, 0]
    grey = (pixel.amax(1) - pixel.amin(1)) < 1e-4
    same = (pixel - colours(2048)[..., 0, 0]).abs().amax(1) < 1e-4
    assert grey.float().mean() == pytest.approx(0.2, abs=0.03)
    assert same.float().mean() == pytest.approx(0.8 * 0.2, abs=0.03)  # neither


def test_a_view_is_float32_also_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert view(GREY_PIXELS).dtype == torch.float32
