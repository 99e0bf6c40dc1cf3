import torch

from dpt_ray.training.throughput import matmul_peak


def test_the_peak_is_a_speed_a_processor_can_have_and_draws_nobody_elses_numbers():
    before = torch.get_rng_state()
    assert 1e8 < matmul_peak("cpu", torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), before)
