"""Settings by number and size of images, and by the time there is."""

import pytest

from dpt_ray.commands.recipe import (
    DENOISER_EPOCHS,
    ENCODER_EPOCHS,
    START,
    WIDTHS,
    Images,
    Training,
    choose,
    latent_recipe,
    lengths,
)
from dpt_ray.pipeline.speed import Rates

SLOW = Rates(conv=50e9, transformer=80e9, device="cpu")  # two cores
FAST = Rates(conv=20e12, transformer=100e12, device="cuda")
PHOTOGRAPHS = Images(train=50_000, all=60_000, side=32, channels=3, classes=10)
FEW = Images(train=400, all=500, side=8, channels=1, classes=10)


def epochs(training: Training, images: Images) -> float:
    return training.steps * training.batch_size / images.train


def test_more_time_gives_larger_networks_and_longer_trainings() -> None:
    recipes = [choose(PHOTOGRAPHS, 60 * minutes, SLOW) for minutes in (10, 100, 1000)]
    assert [r.width for r in recipes] == sorted(r.width for r in recipes)
    assert [r.denoiser.dim for r in recipes] == sorted(r.denoiser.dim for r in recipes)
    seen = [epochs(r.denoising, PHOTOGRAPHS) for r in recipes]
    assert seen == sorted(seen) and seen[0] < seen[2]


def test_a_network_that_is_not_the_smallest_sees_each_image_often_enough() -> None:
    for minutes in (100, 1000, 10_000):
        recipe = choose(PHOTOGRAPHS, 60 * minutes, SLOW)
        if recipe.width > WIDTHS[-1]:
            assert epochs(recipe.encoding, PHOTOGRAPHS) > 0.9 * ENCODER_EPOCHS  # steps have two digits
        if recipe.denoiser.dim > 128:
            assert epochs(recipe.denoising, PHOTOGRAPHS) > 0.9 * DENOISER_EPOCHS


def test_a_fast_machine_trains_the_largest_and_no_longer_than_helps() -> None:
    recipe = choose(PHOTOGRAPHS, 1e6, FAST)
    assert (recipe.width, recipe.denoiser.dim, recipe.images_per_class) == (64, 512, 128)
    assert epochs(recipe.encoding, PHOTOGRAPHS) <= 100 and epochs(recipe.denoising, PHOTOGRAPHS) <= 200
    assert recipe.encoding.batch_size == recipe.denoising.batch_size == 256


def test_few_small_images_have_small_batches_and_still_many_steps() -> None:
    recipe = choose(FEW, 7200, SLOW)
    assert recipe.encoding.batch_size == recipe.denoising.batch_size == 64
    assert recipe.encoding.steps == 1000  # 64,000 images
    assert recipe.denoising.steps == 4000  # 256,000 images
    assert recipe.width <= 32


def test_the_denoiser_takes_its_share_of_the_time() -> None:
    """40% of what is left after the start, by three passes of the operations that torch counts."""
    import torch

    from dpt_ray.models.uvit import UViT, UViTConfig
    from dpt_ray.training.throughput import forward_flops

    recipe = lengths(PHOTOGRAPHS, 6000, SLOW, 16, choose(PHOTOGRAPHS, 60, SLOW).denoiser)
    config = UViTConfig(32, in_channels=3, num_classes=1, **recipe.denoiser.model_dump())
    batch = (torch.empty(1, 3, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    images = recipe.denoising.steps * recipe.denoising.batch_size
    seconds = 3 * forward_flops(UViT(config), *batch) * images / SLOW.transformer
    assert seconds == pytest.approx(0.4 * (6000 - START), rel=0.06)


def test_many_classes_have_fewer_images_each() -> None:
    many = Images(train=50_000, all=60_000, side=32, channels=3, classes=1000)
    assert choose(many, 3600, SLOW).images_per_class < choose(PHOTOGRAPHS, 3600, SLOW).images_per_class


def test_without_any_time_there_is_a_recipe_still() -> None:
    recipe = choose(PHOTOGRAPHS, 1, SLOW)
    assert recipe.encoding.steps == recipe.denoising.steps == 100
    assert recipe.images_per_class == 16  # those of a unit


def test_larger_images_take_what_they_need_unless_time_is_short() -> None:
    few = Images(train=5000, all=6000, side=256, channels=3, classes=10)
    many = Images(train=1_281_167, all=1_331_167, side=256, channels=3, classes=1000)
    assert (latent_recipe(few, None, FAST).denoiser.dim, latent_recipe(many, None, FAST).denoiser.dim) == (
        384,
        512,
    )
    assert latent_recipe(few, None, FAST).denoising == Training(10_000, 256, 2e-4)
    assert latent_recipe(many, None, FAST).denoising == Training(100_000, 256, 2e-4)
    assert latent_recipe(many, 3600, FAST).denoising.steps < 100_000


def test_averages_and_warm_ups_follow_the_steps() -> None:
    assert Training(100, 64, 1e-3).ema_decay == 0.9
    assert Training(2000, 64, 1e-3).ema_decay == 0.995
    assert Training(1_000_000, 64, 1e-3).ema_decay == 0.9999
    assert (Training(1000, 64, 1e-3).warmup_steps, Training(10**6, 64, 1e-3).warmup_steps) == (50, 5000)
