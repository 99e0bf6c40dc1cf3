import numpy as np
import pytest
import torch

from dpt_ray.learners.labelled_mixup import batch_mixup
from dpt_ray.training.random import StepRandom

CLASSES, GROUP, SIZE = 5, 8, 16


def batch(n: int = 32):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, CLASSES, (n,), generator=generator)


def lambdas(images: torch.Tensor, mixed: torch.Tensor):
    """Of each group, whether it is cut, and the weight of each pixel's own image, read off the pixels."""
    for own, found in zip(images.split(GROUP), mixed.split(GROUP), strict=True):
        partner = own.roll(1, 0)
        weight = ((found - partner) / (own - partner)).median(1).values.median(0).values  # (H, W)
        cut = bool(((weight - weight.round()).abs() < 1e-3).all())
        yield cut, weight.round() if cut else weight


def test_images_and_targets_are_mixed_by_one_formula_of_a_group():
    images, labels = batch(256)
    mixed, targets = batch_mixup(CLASSES, GROUP, smoothing=0.1)(images, labels, StepRandom(0, 3, 0, 256))
    smooth = np.eye(CLASSES)[labels.numpy()] * 0.9 + 0.1 / CLASSES
    kinds = []
    for g, (cut, weight) in enumerate(lambdas(images, mixed)):
        part = slice(g * GROUP, (g + 1) * GROUP)
        own, partner = images[part], images[part].roll(1, 0)
        # x~ = w x_i + (1 - w) x_(i-1), where w is 0 or 1 in CutMix and one number in mixup
        torch.testing.assert_close(mixed[part], weight * own + (1 - weight) * partner, rtol=0, atol=2e-3)
        lam = weight.mean().item()
        expected = lam * smooth[part] + (1 - lam) * np.roll(smooth[part], 1, axis=0)
        np.testing.assert_allclose(targets[part].numpy(), expected, atol=2e-3)
        kinds.append(cut)
    assert 8 < sum(kinds) < 24  # of 32 groups, with probability 1/2 each
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, rtol=1e-5)


def test_lambda_is_drawn_from_the_beta_distribution():
    # Of Beta(a, a) the mean is 1/2 and the variance 1 / (4 (2a + 1)).
    images, labels = torch.rand(8 * 4000, 1, 1, 1), torch.arange(8).repeat(4000) % 2
    mix = batch_mixup(2, GROUP, mixup=0.8, cutmix=0.8, smoothing=0.0)
    _, targets = mix(images, labels, StepRandom(0, 0, 0, 8 * 4000))
    lam = targets[::GROUP, 0].numpy()  # label 0 beside a partner of label 1
    lam = lam[(lam > 0) & (lam < 1)]  # CutMix of one pixel takes all or nothing
    assert len(lam) == pytest.approx(2000, abs=150)
    assert lam.mean() == pytest.approx(0.5, abs=0.03)
    assert lam.var() == pytest.approx(1 / (4 * 2.6), abs=0.01)


def test_two_workers_mix_as_one_and_another_step_mixes_otherwise():
    images, labels = batch()
    mix = batch_mixup(CLASSES, GROUP)
    whole = mix(images, labels, StepRandom(0, 3, 0, 32))
    halves = [
        mix(images[lo : lo + 16], labels[lo : lo + 16], StepRandom(0, 3, lo, lo + 16)) for lo in (0, 16)
    ]
    for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts))
    assert not torch.equal(whole[0], mix(images, labels, StepRandom(0, 4, 0, 32))[0])


def test_the_global_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    batch_mixup(CLASSES, GROUP)(*batch(), StepRandom(0, 0, 0, 32))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_cuts_a_group_is_refused():
    with pytest.raises(ValueError, match="8 positions are not a multiple of the mixing group of 16"):
        batch_mixup(CLASSES, 16)(*batch(8), StepRandom(0, 0, 0, 8))
