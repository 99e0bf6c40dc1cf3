import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from dpt_ray.diffusion.schedules import SCHEDULES
from tests.helpers.paths import GOLDEN

EXPECTED = load_file(GOLDEN / "schedules.safetensors")
VARIANCE_PRESERVING = ["vp", "stable_diffusion", "cosine"]


def times(schedule, count=201):
    return torch.linspace(schedule.t_end, schedule.t_start, count, dtype=torch.float64)


def test_vp_matches_the_golden_values():
    vp = SCHEDULES["vp"]
    t = EXPECTED["t"]
    for ours, key in [(vp.alpha, "alpha"), (vp.sigma, "sigma"), (vp.log_snr_half, "lambda")]:
        torch.testing.assert_close(ours(t), EXPECTED[f"vp_{key}"], atol=1e-6, rtol=1e-6)


def test_stable_diffusion_matches_the_golden_cumulative_alphas():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    ours = SCHEDULES["stable_diffusion"].alpha(t).square()
    torch.testing.assert_close(ours, EXPECTED["sd_alphas_cumprod"], atol=1e-9, rtol=1e-9)


def test_stable_diffusion_matches_diffusers_in_float32():
    theirs = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    t = torch.arange(1, 1001, dtype=torch.float32) / 1000
    ours = SCHEDULES["stable_diffusion"].alpha(t).square()
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_stable_diffusion_interpolates_log_alpha_linearly():
    schedule = SCHEDULES["stable_diffusion"]
    t = torch.tensor([0.4, 0.4003, 0.401], dtype=torch.float64)
    left, between, right = schedule.alpha(t).log().tolist()
    assert between == pytest.approx(left + 0.3 * (right - left), rel=1e-9)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
    schedule = SCHEDULES[name]
    t = times(schedule)
    total = schedule.alpha(t).square() + schedule.sigma(t).square()
    torch.testing.assert_close(total, torch.ones_like(t), atol=1e-12, rtol=0)


def test_linear_interpolates_data_and_noise():
    t = torch.tensor([0.25], dtype=torch.float64)
    linear = SCHEDULES["linear"]
    assert (linear.alpha(t).item(), linear.sigma(t).item()) == (0.75, 0.25)


@pytest.mark.parametrize("name", SCHEDULES)
def test_lambda_is_the_log_ratio_and_falls_with_time(name):
    schedule = SCHEDULES[name]
    t = times(schedule)
    lam = schedule.log_snr_half(t)
    expected = (schedule.alpha(t) / schedule.sigma(t)).log()
    torch.testing.assert_close(lam, expected, atol=1e-9, rtol=1e-9)
    assert (lam.diff() < 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_at_inverts_lambda(name):
    schedule = SCHEDULES[name]
    t = times(schedule)
    torch.testing.assert_close(schedule.time_at(schedule.log_snr_half(t)), t, atol=1e-9, rtol=1e-9)


def test_cosine_is_used_between_log_snr_halves_of_five_point_one():
    cosine = SCHEDULES["cosine"]
    ends = torch.tensor([cosine.t_start, cosine.t_end], dtype=torch.float64)
    assert cosine.log_snr_half(ends).tolist() == pytest.approx([-5.1, 5.1])


def test_network_time_is_999_t_for_vp_and_the_step_for_stable_diffusion():
    t = torch.tensor([0.5])
    assert SCHEDULES["vp"].network_time(t).item() == 499.5
    assert SCHEDULES["stable_diffusion"].network_time(t).item() == 500


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_times_stay_inside_the_schedule(name):
    schedule = SCHEDULES[name]
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    t = schedule.training_times(u)
    assert (t.diff() > 0).all()
    assert t.min() >= 0
    assert t.max() <= 1
    assert torch.isfinite(schedule.alpha(t)).all()


def test_stable_diffusion_trains_on_each_of_the_thousand_steps_equally():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    steps = SCHEDULES["stable_diffusion"].training_times(u) * 1000
    assert torch.bincount(steps.round().long())[1:].tolist() == [10] * 1000
