import math

import pytest
import torch

from dpt_ray.diffusion.loss import (
    PREDICTIONS,
    latents_from_moments,
    min_snr_weight,
    to_noise_and_data,
    training_loss,
)
from dpt_ray.diffusion.schedules import SCHEDULES


def tensors(seed=0, shape=(3, 2, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_latents_are_scaled_mean_plus_std_times_noise():
    mean, noise = torch.tensor(2.0), torch.tensor(-1.5)
    moments = torch.stack([mean, torch.tensor(math.log(9.0))]).reshape(1, 2, 1, 1)
    latents = latents_from_moments(moments, noise.reshape(1, 1, 1, 1), 0.18215)
    assert latents.item() == pytest.approx(0.18215 * (2.0 - 1.5 * 3.0))


@pytest.mark.parametrize(("log_variance", "clamped"), [(50.0, 20.0), (-90.0, -30.0)])
def test_log_variance_is_clamped(log_variance, clamped):
    moments = torch.tensor([0.0, log_variance], dtype=torch.float64).reshape(1, 2, 1, 1)
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert latents_from_moments(moments, noise, 1.0).item() == pytest.approx(math.exp(clamped / 2))


def test_loss_matches_the_formula_written_out_for_one_value():
    """Cosine at t = 1/3: alpha = cos 30 degrees, sigma = sin 30 degrees."""
    alpha, sigma, data, noise, output = math.sqrt(0.75), 0.5, 0.7, -1.1, 0.2
    targets = {"noise": noise, "v": alpha * noise - sigma * data, "flow": noise - data}
    seen = []

    def network(x, time, labels):
        seen.append((x.item(), time.item(), labels.item()))
        return torch.full_like(x, output)

    def loss(prediction):
        return training_loss(
            network,
            torch.full((1, 1, 1, 1), data),
            torch.tensor([4]),
            torch.tensor([1 / 3]),
            torch.full((1, 1, 1, 1), noise),
            SCHEDULES["cosine"],
            prediction,
        ).item()

    for prediction, target in targets.items():
        assert loss(prediction) == pytest.approx((output - target) ** 2, rel=1e-5)
    assert seen[0] == pytest.approx((alpha * data + sigma * noise, 1000 / 3, 4), rel=1e-5)


def test_loss_is_per_sample():
    data, noise = tensors()
    labels = torch.arange(3)

    def network(x, time, labels):
        return noise + labels.reshape(-1, 1, 1, 1)

    t = torch.full((3,), 0.5, dtype=torch.float64)
    loss = training_loss(network, data, labels, t, noise, SCHEDULES["vp"], "noise")
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0]))


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_back_noise_and_data(schedule_name, prediction):
    data, noise = tensors()
    schedule = SCHEDULES[schedule_name]
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha = schedule.alpha(t).reshape(3, 1, 1, 1)
    sigma = schedule.sigma(t).reshape(3, 1, 1, 1)
    output = {"noise": noise, "v": alpha * noise - sigma * data, "flow": noise - data}[prediction]
    eps, x0 = to_noise_and_data(prediction, output, alpha * data + sigma * noise, t, schedule)
    torch.testing.assert_close(eps, noise)
    torch.testing.assert_close(x0, data)


def test_a_scalar_time_serves_the_whole_batch():
    x, output = tensors()
    schedule = SCHEDULES["vp"]
    one = to_noise_and_data("v", output, x, torch.tensor(0.3), schedule)
    each = to_noise_and_data("v", output, x, torch.full((3,), 0.3), schedule)
    torch.testing.assert_close(one, each)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("noise", lambda snr, gamma: min(snr, gamma) / snr),
        ("v", lambda snr, gamma: min(snr, gamma) / (snr + 1)),
        ("flow", lambda snr, gamma: min(snr, gamma) / (math.sqrt(snr) + 1) ** 2),
    ],
)
@pytest.mark.parametrize("t", [0.05, 0.9])
def test_min_snr_weights_match_the_papers_forms(prediction, expected, t):
    snr = 1 / math.tan(math.pi * t / 2) ** 2
    weight = min_snr_weight(torch.tensor([t]).double(), SCHEDULES["cosine"], prediction, 5.0)
    assert weight.item() == pytest.approx(expected(snr, 5.0))


def test_an_unknown_prediction_is_refused_with_the_choices():
    x, output = tensors()
    with pytest.raises(ValueError, match="'x0' is unknown: use one of noise, v, flow"):
        to_noise_and_data("x0", output, x, torch.tensor(0.5), SCHEDULES["vp"])
