import hashlib

import pytest
import torch

from dpt_ray.diffusion.sampling import Sampling, image_noise, sample
from dpt_ray.models.uvit import UViT, UViTConfig

CONFIG = UViTConfig(8, 2, 4, dim=64, depth=4, heads=4, num_classes=10)
LABELS = torch.tensor([1, 2, 5])


@pytest.fixture(scope="module")
def uvit():
    """Weights so large that the network, not the noise, makes half of a sample."""
    torch.manual_seed(0)
    network = UViT(CONFIG).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return network


def sampling(precision, guidance=1.4):
    return Sampling("vp", "noise", "dpm_solver_pp_2m", 8, guidance, None, precision)


def noise():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("guidance", [1.0, 1.4])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_evaluation_of_the_network_runs_at_the_precision_and_nothing_else_does(precision, guidance):
    seen = set()

    def network(x, time, labels):
        seen.add((x.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return torch.zeros_like(x)

    sample(network, noise(), LABELS, 10, sampling(precision, guidance))
    assert seen == {(torch.float32, precision == "bfloat16", torch.bfloat16)}
    assert not torch.is_autocast_enabled("cpu")


def test_float32_is_float32_within_another_precision(uvit):
    expected = sample(uvit, noise(), LABELS, 10, sampling("float32"))
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(uvit, noise(), LABELS, 10, sampling("float32"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("guidance", [1.0, 1.4])
def test_bfloat16_samples_are_float32_ones_to_bfloat16s_accuracy(uvit, guidance):
    exact = sample(uvit, noise(), LABELS, 10, sampling("float32", guidance))
    fast = sample(uvit, noise(), LABELS, 10, sampling("bfloat16", guidance))
    assert fast.dtype == torch.float32
    nothing = sample(lambda x, time, labels: torch.zeros_like(x), noise(), LABELS, 10, sampling("float32"))
    assert distance(nothing, exact) > 0.5
    assert 0 < distance(fast, exact) < torch.finfo(torch.bfloat16).eps


def test_an_unknown_precision_is_named(uvit):
    with pytest.raises(ValueError, match="precision 'bf16' must be one of"):
        sample(uvit, noise(), LABELS, 10, sampling("bf16"))


def test_each_attempt_at_an_image_has_noise_of_its_own_and_the_first_that_of_an_image_with_one():
    attempts = [image_noise(0, 3, 9, (2, 4), attempt) for attempt in range(3)]
    assert torch.equal(attempts[0], image_noise(0, 3, 9, (2, 4)))
    seed = int.from_bytes(hashlib.blake2b(b"0/3/9", digest_size=8).digest(), "little")
    assert torch.equal(attempts[0], torch.randn(2, 4, generator=torch.Generator().manual_seed(seed)))
    assert len({tuple(noise.flatten().tolist()) for noise in attempts}) == 3
