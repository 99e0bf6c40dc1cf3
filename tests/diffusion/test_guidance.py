import pytest
import torch

from dpt_ray.diffusion.guidance import guided_denoiser
from dpt_ray.diffusion.schedules import SCHEDULES

LABELS = torch.tensor([1, 2, 5])
NULL = 10
SCHEDULE = SCHEDULES["vp"]


class Recorder:
    """A network that answers x * label and remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, time, labels):
        self.calls.append((len(x), time.tolist(), labels.tolist()))
        return x * labels.reshape(-1, 1, 1, 1)


def noise_for(guidance, t, interval=None):
    network = Recorder()
    denoise = guided_denoiser(network, SCHEDULE, LABELS, "noise", guidance, NULL, interval)
    eps, data = denoise(torch.ones(3, 1, 2, 2), t)
    assert eps.shape == data.shape == (3, 1, 2, 2)
    return network.calls, eps[:, 0, 0, 0].tolist(), data[:, 0, 0, 0]


def test_guidance_is_one_forward_of_twice_the_batch():
    calls, eps, _ = noise_for(1.4, 0.5)
    assert calls == [(6, [499.5] * 6, [1, 2, 5, NULL, NULL, NULL])]
    assert eps == pytest.approx([10 + 1.4 * (label - 10) for label in (1, 2, 5)])


def test_guidance_of_one_is_one_conditional_forward_of_the_batch():
    calls, eps, _ = noise_for(1.0, 0.5)
    assert calls == [(3, [499.5] * 3, [1, 2, 5])]
    assert eps == [1, 2, 5]


@pytest.mark.parametrize(("t", "guided"), [(0.1, False), (0.2, True), (0.7, True), (0.9, False)])
def test_outside_the_interval_the_plain_conditional_is_used(t, guided):
    calls, eps, _ = noise_for(2.0, t, interval=(0.2, 0.7))
    assert calls[0][0] == (6 if guided else 3)
    assert eps == pytest.approx([-8, -6, 0] if guided else [1, 2, 5])


def test_data_belongs_to_the_guided_noise():
    _, eps, data = noise_for(1.4, 0.5)
    t = torch.tensor(0.5)
    expected = (1 - SCHEDULE.sigma(t) * torch.tensor(eps)) / SCHEDULE.alpha(t)
    torch.testing.assert_close(data, expected)


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="empty"):
        guided_denoiser(Recorder(), SCHEDULE, LABELS, "noise", 1.4, NULL, (0.7, 0.2))


def test_a_guided_prediction_is_combined_in_the_precision_of_x_not_of_the_network():
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def network(x, time, labels):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
        return (x * (1 + 0.1 * labels.reshape(-1, 1, 1, 1))).to(torch.bfloat16)

    denoise = guided_denoiser(network, SCHEDULE, LABELS, "noise", 1.4, NULL, precision="bfloat16")
    eps, _ = denoise(x, 0.5)
    conditional = (x * (1 + 0.1 * LABELS.reshape(-1, 1, 1, 1))).to(torch.bfloat16).float()
    unconditional = (x * (1 + 0.1 * NULL)).to(torch.bfloat16).float()
    torch.testing.assert_close(eps, unconditional + 1.4 * (conditional - unconditional), rtol=1e-6, atol=1e-6)
