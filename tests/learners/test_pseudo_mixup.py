import math

import pytest
import torch
from safetensors.torch import load_file

from dpt_ray.learners.pseudo_mixup import (
    CutMix,
    cutmix_boxes,
    partners_within,
    pseudo_loss,
    pseudo_mixup,
)
from dpt_ray.training.random import StepRandom
from tests.helpers.paths import GOLDEN

SWAP = torch.tensor([1, 0])


def test_mixup_is_the_published_one():
    g = load_file(GOLDEN / "prob_pseudo_mixup.safetensors")
    mixed = pseudo_mixup(g["x"], g["target"], g["prob"], g["perm"], num_classes=7, smoothing=0.1)
    assert (mixed.images - g["x_mixed"]).abs().max() <= 1e-6
    assert (mixed.targets - g["target_mixed"]).abs().max() <= 1e-6
    assert (mixed.confidence - g["prob_mixed"]).abs().max() <= 1e-6


def test_the_surer_image_has_the_larger_part_in_both_mixtures():
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    mixed = pseudo_mixup(
        images, torch.tensor([0, 2]), torch.tensor([0.9, 0.3]), SWAP, num_classes=4, smoothing=0.2
    )
    # lam = 0.75 for the first, 0.25 for the second; off = 0.2 / 4, on = 1 - 0.2 + 0.2 / 4.
    torch.testing.assert_close(mixed.images, torch.full((2, 1, 2, 2), 0.25))
    expected = torch.tensor([0.75 * 0.85 + 0.25 * 0.05, 0.05, 0.75 * 0.05 + 0.25 * 0.85, 0.05])
    torch.testing.assert_close(mixed.targets, expected.expand(2, 4))
    assert mixed.confidence.tolist() == [pytest.approx(0.9)] * 2


def test_an_image_that_is_its_own_partner_stays():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cutmix = CutMix(torch.tensor([False, True]), torch.full((2, 2), 0.5))
    itself = torch.arange(2)
    mixed = pseudo_mixup(images, itself, torch.tensor([0.4, 0.8]), itself, 2, 0.0, cutmix)
    torch.testing.assert_close(mixed.images, images)
    torch.testing.assert_close(mixed.targets, torch.eye(2))


def box(lam, centre, height, width):
    """First and last row and column of one box."""
    inside = cutmix_boxes(torch.tensor([lam]), torch.tensor([centre]), height, width)[0]
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    assert inside.sum() == len(rows) * len(columns)
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


@pytest.mark.parametrize(
    ("lam", "centre", "size", "expected"),
    [
        (0.75, (0.5, 0.5), (8, 8), (2, 5, 2, 5)),  # half of 8 = 4 around pixel 4
        (0.75, (0.0, 0.99), (8, 8), (0, 1, 5, 7)),  # clipped above and on the right
        (0.75, (0.5, 0.5), (6, 10), (2, 4, 3, 7)),  # odd lengths 3 and 5, centred
        (0.4375, (0.5, 0.5), (8, 4), (1, 6, 1, 3)),  # sqrt(0.5625) = 3/4
        (0.0, (0.5, 0.5), (4, 4), (0, 3, 0, 3)),
    ],
)
def test_a_box_has_the_root_of_the_partners_part_and_ends_at_the_border(lam, centre, size, expected):
    assert box(lam, centre, *size) == expected


def test_no_part_for_the_partner_makes_no_box():
    assert not cutmix_boxes(torch.ones(1), torch.full((1, 2), 0.5), 8, 8).any()


def test_cutmix_pastes_the_partners_box_and_weighs_the_labels_by_pixels():
    images = torch.stack([torch.zeros(2, 8, 8), torch.ones(2, 8, 8), torch.full((2, 8, 8), 5.0)])
    partners = torch.tensor([1, 2, 0])
    # lam = 0.75 for the first; centred in a corner, a quarter of its 4 x 4 box stays inside.
    confidence = torch.tensor([0.9, 0.3, 0.6])
    cutmix = CutMix(torch.tensor([True, False, False]), torch.zeros(3, 2))
    mixed = pseudo_mixup(images, torch.tensor([0, 1, 2]), confidence, partners, 3, 0.0, cutmix)

    expected = torch.zeros(8, 8)
    expected[:2, :2] = 1
    assert torch.equal(mixed.images[0], expected.expand(2, 8, 8))
    left = 60 / 64
    torch.testing.assert_close(mixed.targets[0], torch.tensor([left, 1 - left, 0]))
    # The others are blended: lam = 0.3 / 0.9 and 0.6 / 1.5.
    torch.testing.assert_close(mixed.images[1], torch.full((2, 8, 8), 1 / 3 + 2 / 3 * 5))
    torch.testing.assert_close(mixed.targets[1], torch.tensor([0, 1 / 3, 2 / 3]))
    torch.testing.assert_close(mixed.images[2], torch.full((2, 8, 8), 0.4 * 5))
    torch.testing.assert_close(mixed.confidence, torch.tensor([0.9, 0.6, 0.9]))


def test_images_keep_their_dtype():
    images = torch.ones(2, 1, 2, 2, dtype=torch.bfloat16)
    mixed = pseudo_mixup(images, SWAP, torch.tensor([0.9, 0.3]), SWAP, 2)
    assert mixed.images.dtype == torch.bfloat16
    assert mixed.targets.dtype == torch.float32


def test_partners_permute_each_group_and_never_leave_it():
    keys = torch.rand(24, generator=torch.Generator().manual_seed(0))
    partners = partners_within(keys, 8)
    for lo in (0, 8, 16):
        assert sorted(partners[lo : lo + 8].tolist()) == list(range(lo, lo + 8))
    assert not torch.equal(partners, torch.arange(24))
    assert sorted(partners_within(keys, 24).tolist()) == list(range(24))
    assert {i // 8 == p // 8 for i, p in enumerate(partners_within(keys, 24).tolist())} == {True, False}


def test_two_workers_mix_as_one():
    def partners(lo, hi):
        return lo + partners_within(StepRandom(0, 3, lo, hi).uniform("partner"), 16)

    assert torch.equal(partners(0, 64), torch.cat([partners(0, 32), partners(32, 64)]))


def test_a_batch_that_cuts_a_group_is_refused():
    with pytest.raises(ValueError, match="24 positions are not a multiple of the mixing group of 16"):
        partners_within(torch.zeros(24), 16)


def test_the_loss_counts_unsure_elements_as_zero_in_the_mean_over_all():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [2.0, 1.0]], requires_grad=True)
    targets = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    loss = pseudo_loss(logits, targets, torch.tensor([0.7, 0.6, 0.59]), threshold=0.6)
    entropies = -0.75 * math.log(0.75) - 0.25 * math.log(0.25), math.log(2)
    assert loss.item() == pytest.approx(sum(entropies) / 3, rel=1e-6)
    loss.backward()
    # softmax equals the target in the two that count, and the third does not count.
    torch.testing.assert_close(logits.grad, torch.zeros(3, 2), atol=1e-7, rtol=0)


def test_the_losses_gradient_is_prediction_minus_target_of_the_sure_elements():
    logits = torch.zeros(2, 2, requires_grad=True)
    targets = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    pseudo_loss(logits, targets, torch.tensor([0.8, 0.4]), threshold=0.5).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.2, 0.2], [0.0, 0.0]]))
