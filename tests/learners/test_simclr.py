import math

import pytest
import torch
from torch import nn

from dpt_ray.learners.digits import digit_view
from dpt_ray.learners.simclr import ProjectedEncoder, nt_xent, simclr_step
from dpt_ray.learners.supervised import LabelledEncoder, supervised_step
from dpt_ray.training.random import StepRandom


def random_images(n: int, channels: int = 1, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, side, side, generator=generator) * 2 - 1


def flat_encoder() -> ProjectedEncoder:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(1))
    return ProjectedEncoder(encoder, 16, 8, torch.Generator().manual_seed(2))


def direct_nt_xent(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> float:
    """Eq. 1 of the paper, term by term, in double precision."""
    z = [v.double() for pair in zip(z1, z2, strict=True) for v in pair]  # 2k, 2k+1 positive
    similarity = [[float(a @ b / a.norm() / b.norm()) for b in z] for a in z]
    total = 0.0
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        rest = sum(math.exp(similarity[i][k] / temperature) for k in range(len(z)) if k != i)
        total -= math.log(math.exp(similarity[i][j] / temperature) / rest)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_papers_formula(temperature):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 12, 5, generator=generator)
    loss = nt_xent(z1, z2, temperature, group=12).item()
    assert loss == pytest.approx(direct_nt_xent(z1, z2, temperature), rel=1e-5)


def test_nt_xent_is_the_mean_over_its_groups():
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 24, 5, generator=generator)
    groups = [direct_nt_xent(z1[i : i + 8], z2[i : i + 8], 0.2) for i in (0, 8, 16)]
    assert nt_xent(z1, z2, 0.2, group=8).item() == pytest.approx(sum(groups) / 3, rel=1e-5)


def test_two_workers_losses_average_to_that_of_one():
    model, images = flat_encoder(), random_images(64)
    step = simclr_step(digit_view, temperature=0.2, contrast_group=16)
    whole = step(model, {"image": images}, StepRandom(0, 5, 0, 64))
    halves = [step(model, {"image": images[lo : lo + 32]}, StepRandom(0, 5, lo, lo + 32)) for lo in (0, 32)]
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-5, atol=0)


def test_a_slice_that_cuts_a_contrast_group_is_refused():
    step = simclr_step(digit_view, temperature=0.2, contrast_group=32)
    with pytest.raises(ValueError, match="contrast_group of 32"):
        step(flat_encoder(), {"image": random_images(16)}, StepRandom(0, 0, 0, 16))


def test_a_view_belongs_to_its_position_and_name():
    images = random_images(16, channels=3)
    whole = digit_view(images, StepRandom(0, 0, 0, 16), "a")
    parts = [digit_view(images[i : i + 8], StepRandom(0, 0, i, i + 8), "a") for i in (0, 8)]
    torch.testing.assert_close(whole, torch.cat(parts))
    assert not torch.allclose(whole, digit_view(images, StepRandom(0, 0, 0, 16), "b"))
    same = images[:1].expand(16, -1, -1, -1)
    views = digit_view(same, StepRandom(0, 0, 0, 16), "a")
    assert len({tuple(v.flatten().tolist()) for v in views}) == 16


def test_strength_zero_leaves_the_images_alone():
    images = random_images(8, channels=3)
    view = digit_view(images, StepRandom(0, 0, 0, 8), "a", strength=0)
    torch.testing.assert_close(view, images, rtol=0, atol=1e-5)


def test_a_view_never_mirrors_and_keeps_most_of_the_area():
    """On coordinate ramps a view shows where its pixels come from: their slopes are the map."""
    ramp = (torch.arange(8) + 0.5) / 4 - 1
    images = torch.stack([ramp.expand(8, 8), ramp[:, None].expand(8, 8)]).expand(512, -1, -1, -1)
    quiet = StepRandom(0, 0, 0, 512)
    quiet.normal = lambda name, shape: torch.zeros(512, *shape)  # no pixel noise
    view = digit_view(images, quiet, "a")
    dx = (view[..., 4, 4] - view[..., 4, 3]) * 4  # (512, 2): change of (x, y) along a row
    dy = (view[..., 4, 4] - view[..., 3, 4]) * 4
    area = dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]
    assert area.min() > 0.3 and area.max() < 3
    assert dx[:, 0].min() > 0 and dy[:, 1].min() > 0


def test_supervised_loss_of_an_undecided_classifier_is_log_of_the_classes():
    model = LabelledEncoder(nn.Flatten(), 64, 10, torch.Generator().manual_seed(0))
    nn.init.zeros_(model.head.weight)
    batch = {"image": random_images(16), "label": torch.arange(16) % 10}
    loss = supervised_step(digit_view, strength=1.0)(model, batch, StepRandom(0, 0, 0, 16))
    assert loss.item() == pytest.approx(math.log(10), rel=1e-5)


def test_initial_heads_come_from_the_generator():
    heads = [ProjectedEncoder(nn.Flatten(), 8, 4, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    first, same, other = ([p.flatten() for p in h.parameters()] for h in heads)
    assert torch.equal(torch.cat(first), torch.cat(same))
    assert not torch.equal(torch.cat(first), torch.cat(other))
