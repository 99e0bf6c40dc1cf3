import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from dpt_ray.learners.weak_strong import (
    RandAugment,
    draw_views,
    network_pixels,
    photograph_views,
    small_image_views,
    view_keys,
)
from dpt_ray.training.random import StepRandom

KINDS = pytest.mark.parametrize(
    "views", [small_image_views(16), photograph_views(16)], ids=["small", "photo"]
)


def images(n: int = 16) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@KINDS
def test_two_workers_draw_the_views_of_one(views):
    x = images()
    for transform in views:
        whole = draw_views(x, transform, view_keys(StepRandom(0, 3, 0, 16), "view"))
        halves = [
            draw_views(x[lo : lo + 8], transform, view_keys(StepRandom(0, 3, lo, lo + 8), "view"))
            for lo in (0, 8)
        ]
        assert torch.equal(whole, torch.cat(halves))


@KINDS
def test_views_keep_dtype_and_size_and_another_step_draws_others(views):
    x = images()
    for transform in views:
        first, second = (
            draw_views(x, transform, view_keys(StepRandom(0, step, 0, 16), "view")) for step in (3, 4)
        )
        assert first.dtype == torch.uint8
        assert first.shape == x.shape
        assert not torch.equal(first, second)


@KINDS
def test_drawing_leaves_the_global_generators_as_they_were(views):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draw_views(images(), views.strong, range(16))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_every_image_of_a_position_has_its_own_key():
    keys = view_keys(StepRandom(0, 0, 0, 16), "view", per_position=5)
    assert len(keys) == len(set(keys)) == 80


def test_a_weak_small_view_is_the_image_shifted_or_mirrored():
    ramp = torch.arange(16, dtype=torch.uint8).expand(8, 3, 16, 16)
    for row in draw_views(ramp, small_image_views(16).weak, range(8))[:, 0, 8].int():
        # Neighbours of a ramp differ by 1, also where it is reflected at the border.
        assert row.diff().abs().tolist() == [1] * 15


def test_a_strong_small_view_erases_a_quarter_of_a_black_image_at_least():
    black = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    strong = draw_views(black, small_image_views(16).strong, range(8))
    assert ((strong == 127).all(1).sum((1, 2)) >= 64).all()


def test_as_many_strong_views_of_photographs_have_a_part_erased_as_asked():
    white = torch.full((40, 3, 32, 32), 255, dtype=torch.uint8)

    def erased(erasing):
        transform = photograph_views(32, erasing).strong.transforms[-1]
        return int((draw_views(white, transform, range(40)) == 127).flatten(1).any(1).sum())

    assert (erased(0.0), erased(1.0)) == (0, 40) and 3 <= erased(0.25) <= 20


def test_floats_are_refused_and_pixels_span_the_networks_range():
    with pytest.raises(ValueError, match="uint8"):
        draw_views(torch.zeros(1, 3, 16, 16), small_image_views(16).weak, [0])
    assert network_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_rand_augment_is_timms_with_its_own_draw():
    published = {"translate_const": 7, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    transform = rand_augment_transform("rand-m9-mstd0.5-inc1", published)
    changed = 0
    for key, image in enumerate(images(40)):
        torch.manual_seed(key)
        seed = int(torch.randint(1 << 32, ()))
        random.seed(seed)
        np.random.seed(seed)
        expected = np.array(transform(Image.fromarray(image.permute(1, 2, 0).numpy())))
        [found] = draw_views(image[None], RandAugment(16), [key])
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
        changed += not torch.equal(found, image)
    assert 20 <= changed < 40  # neither of two is done with probability 1/4


def test_no_operation_fails_at_the_largest_magnitude():
    augment = RandAugment(16)
    [image] = images(1)
    for operation in augment.augment.ops:
        operation.magnitude, operation.prob, augment.augment.ops = 20, 1.0, [operation]
        assert augment(image).shape == image.shape


def test_a_grey_image_stays_grey():
    assert draw_views(images()[:, :1], photograph_views(16).strong, range(16)).shape == (16, 1, 16, 16)
