import pytest
import torch

from dpt_ray.training.random import StepRandom


def draw(random: StepRandom) -> list[torch.Tensor]:
    return [
        random.normal("noise", (2, 3, 3)),
        random.uniform("time"),
        random.integers("label", 10, (2,)),
    ]


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_sees_the_same_numbers(workers):
    size = 64 // workers
    slices = [draw(StepRandom(7, 3, w * size, (w + 1) * size)) for w in range(workers)]
    for whole, *parts in zip(draw(StepRandom(7, 3, 0, 64)), *slices, strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_seed_step_position_and_name_each_change_the_numbers():
    base = StepRandom(0, 0, 0, 8).normal("a", (4,))
    for other in (
        StepRandom(1, 0, 0, 8).normal("a", (4,)),
        StepRandom(0, 1, 0, 8).normal("a", (4,)),
        StepRandom(0, 0, 8, 16).normal("a", (4,)),
        StepRandom(0, 0, 0, 8).normal("b", (4,)),
    ):
        assert not torch.equal(base, other)


def test_numbers_have_the_distribution_asked_for():
    random = StepRandom(0, 0, 0, 4096)
    normal = random.normal("n", (4,))
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    uniform = random.uniform("u", (4,))
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    counts = torch.bincount(random.integers("i", 4, (4,)).flatten(), minlength=4)
    assert len(counts) == 4 and (counts / 4096 - 1).abs().max() < 0.1


@pytest.mark.parametrize(("lo", "hi"), [(0, 12), (4, 8), (8, 8), (16, 8), (-8, 8)])
def test_positions_that_cut_a_group_are_refused(lo, hi):
    with pytest.raises(ValueError, match="multiple of 8"):
        StepRandom(0, 0, lo, hi)
