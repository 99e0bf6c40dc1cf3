import pytest
import torch
from torch import nn

from dpt_ray.training import throughput
from dpt_ray.training.throughput import forward_flops, matmul_peak

measured_peak = matmul_peak.__wrapped__  # past the memory of what this process has measured


def test_the_peak_is_a_speed_a_processor_can_have_and_draws_nobody_elses_numbers():
    before = torch.get_rng_state()
    assert 1e8 < measured_peak("cpu", torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("speed", "largest"), [(1.1e9, 512), (57e9, 2048), (3e12, 2048)])
def test_the_peak_of_any_machine_is_measured_in_about_a_second(monkeypatch, speed, largest):
    """By a clock that only products advance, at a fixed speed."""
    clock, sizes = [0.0], []

    def product(a, b, out):
        sizes.append(len(a))
        clock[0] += 2 * len(a) ** 3 / speed

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", product)
    assert measured_peak("cpu", torch.float32) == pytest.approx(speed)
    assert max(sizes) == largest and clock[0] < 1.5


def test_flops_of_a_forward_pass_are_two_for_each_multiply_add_of_its_products():
    network = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(5 * 8 * 6, 7))
    expected = 2 * (9 * 2 * 5 * 8 * 6 + 5 * 8 * 6 * 7)
    assert forward_flops(network, torch.zeros(1, 2, 8, 6)) == expected
    assert forward_flops(network, torch.zeros(4, 2, 8, 6)) == 4 * expected
