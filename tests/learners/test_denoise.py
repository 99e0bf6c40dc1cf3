import pytest
import torch
from torch import nn

from dpt_ray.diffusion.schedules import ContinuousVP
from dpt_ray.learners.denoise import denoise_step
from dpt_ray.training.random import StepRandom


class Spy(nn.Module):
    """A network that predicts zero noise and keeps what it was given."""

    def forward(self, x, time, labels):
        self.x, self.time, self.labels = x, time, labels
        return torch.zeros_like(x)


def step_on(moments, label_dropout=0.1, lo=0, scale=1.0, labels=None, **options):
    n = len(moments)
    step = denoise_step(
        ContinuousVP(), "noise", scale, num_classes=10, label_dropout=label_dropout, **options
    )
    labels = torch.arange(n) % 10 if labels is None else labels
    spy = Spy()
    loss = step(spy, {"moments": moments, "label": labels}, StepRandom(3, 4, lo, lo + n))
    return loss, spy


def constant_moments(n: int, mean: float, std: float = 0.0, shape=(2, 4, 4)) -> torch.Tensor:
    log_variance = 2 * torch.tensor(std).log().clamp(min=-30)
    means = torch.full((n, *shape), mean)
    return torch.cat([means, log_variance.expand_as(means)], dim=1)


def test_predicting_no_noise_costs_the_noises_variance():
    loss, _ = step_on(constant_moments(2048, mean=0.5))
    assert loss.item() == pytest.approx(1.0, abs=0.02)


def test_noised_latents_have_the_schedules_mean_and_variance():
    # z = scale (mean + std e), x = alpha z + sigma eps, with time 999 t.
    _, spy = step_on(constant_moments(4096, mean=3.0, std=2.0), scale=0.5)
    t = spy.time / 999
    log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
    alpha = log_alpha.exp()[:, None, None, None]
    variance = alpha**2 * (0.5 * 2.0) ** 2 + 1 - alpha**2  # = 1 here, at every t
    standard = (spy.x - alpha * 0.5 * 3.0) / variance.sqrt()
    assert abs(standard.mean()) < 0.01 and abs(standard.var() - 1) < 0.02
    assert t.min() >= 0 and t.max() < 1 and abs(t.mean() - 0.5) < 0.02


@pytest.mark.parametrize("rate", [0.0, 0.15, 1.0])
def test_labels_are_dropped_to_the_null_class_at_the_rate(rate):
    labels = torch.arange(8192) % 10
    _, spy = step_on(constant_moments(8192, 0.0, shape=(1, 1, 1)), rate, labels=labels)
    null = spy.labels == 10
    assert torch.equal(spy.labels[~null], labels[~null])
    assert abs(null.float().mean() - rate) < (0.015 if 0 < rate < 1 else 1e-9)


def test_each_position_takes_one_of_its_two_flips():
    pair = torch.stack([constant_moments(4096, m) for m in (-100.0, 100.0)], dim=1)
    _, spy = step_on(pair)
    early = spy.time < 200  # the sign of the mean still shows
    sign = spy.x[early].mean(dim=(1, 2, 3)).sign()
    assert set(sign.tolist()) == {-1.0, 1.0} and abs(sign.mean()) < 0.1


def test_two_workers_draw_what_one_draws():
    moments = constant_moments(32, 1.0, 1.0)
    loss, whole = step_on(moments)
    halves = [step_on(moments[:16], lo=lo, labels=(torch.arange(32) % 10)[lo : lo + 16]) for lo in (0, 16)]
    assert torch.equal(whole.x, torch.cat([spy.x for _, spy in halves]))
    assert torch.equal(whole.labels, torch.cat([spy.labels for _, spy in halves]))
    torch.testing.assert_close(loss, (halves[0][0] + halves[1][0]) / 2)


def test_float16_moments_are_widened_first():
    moments = constant_moments(16, 1.0, 1.0)
    (half, _), (full, _) = step_on(moments.half()), step_on(moments)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=1e-3, atol=1e-3)


def test_min_snr_weights_each_samples_loss_by_its_formula():
    # Min-SNR-gamma for noise prediction (arXiv 2303.09556, Eq. 8): min(SNR, gamma) / SNR.
    loss, spy = step_on(constant_moments(64, mean=0.5), min_snr_gamma=5.0)
    alpha2 = torch.exp(-((spy.time.double() / 999) ** 2) * 9.95 - 0.1 * spy.time.double() / 999)
    snr = alpha2 / (1 - alpha2)
    noise = StepRandom(3, 4, 0, 64).normal("noise", (2, 4, 4)).double()
    expected = (noise.square().mean(dim=(1, 2, 3)) * snr.clamp(max=5) / snr).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss < step_on(constant_moments(64, mean=0.5))[0]
