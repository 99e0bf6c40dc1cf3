import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file

from dpt_ray.diffusion.schedules import SCHEDULES
from dpt_ray.diffusion.solvers import SOLVERS, dpm_solver_fast, dpm_solver_pp_2m, dpm_solver_pp_fast
from tests.helpers.paths import GOLDEN

STD = 0.5


class GaussianDenoiser:
    """The exact denoiser of data distributed as N(mu, STD^2); counts its calls."""

    def __init__(self, schedule, mu):
        self.schedule, self.mu, self.calls = schedule, mu, 0

    def __call__(self, x, t):
        self.calls += 1
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = self.schedule.alpha(time).item(), self.schedule.sigma(time).item()
        eps = sigma * (x - alpha * self.mu) / ((STD * alpha) ** 2 + sigma**2)
        return eps, (x - sigma * eps) / alpha

    def exact(self, x):
        """The ODE keeps each quantile: (x - alpha mu) / std of x_t is constant along it."""
        ends = torch.tensor([self.schedule.t_start, self.schedule.t_end], dtype=torch.float64)
        (a0, a1), (s0, s1) = self.schedule.alpha(ends).tolist(), self.schedule.sigma(ends).tolist()
        spread = [math.hypot(STD * a, s) for a, s in ((a0, s0), (a1, s1))]
        return a1 * self.mu + spread[1] / spread[0] * (x - a0 * self.mu)


def problem(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    return GaussianDenoiser(SCHEDULES[name], mu), x


@pytest.mark.parametrize(
    ("solver", "schedule", "nfe", "file"),
    [
        (dpm_solver_fast, "vp", 50, "dpm_solver_fast_vp_50"),
        (dpm_solver_fast, "vp", 10, "dpm_solver_fast_vp_10"),
        (dpm_solver_pp_fast, "stable_diffusion", 50, "dpm_solver_pp_sd_50"),
    ],
)
def test_published_solvers_give_the_golden_sample(solver, schedule, nfe, file):
    golden = load_file(GOLDEN / f"{file}.safetensors")
    denoiser = GaussianDenoiser(SCHEDULES[schedule], golden["mu"])
    out = solver(denoiser, golden["x_init"], SCHEDULES[schedule], nfe)
    assert out.dtype == torch.float32
    assert (out - golden["out"]).abs().max() <= 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("nfe", [1, 2, 3, 4, 5, 6, 10, 25])
def test_exactly_nfe_evaluations_are_spent(solver, nfe):
    denoiser, x = problem("vp")
    out = SOLVERS[solver](denoiser, x, denoiser.schedule, nfe)
    assert denoiser.calls == nfe
    assert out.shape == x.shape


def test_multistep_matches_diffusers_on_the_same_times():
    nfe = 12
    denoiser, x = problem("stable_diffusion")
    schedule = denoiser.schedule
    ends = torch.tensor([schedule.t_start, schedule.t_end], dtype=torch.float64)
    lambdas = torch.linspace(*schedule.log_snr_half(ends).tolist(), nfe + 1, dtype=torch.float64)
    times = schedule.time_at(lambdas).tolist()

    theirs = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", euler_at_final=True,
    )  # fmt: skip
    theirs.set_timesteps(nfe)
    theirs.sigmas = (-lambdas).exp()  # diffusers' sigma is the ratio sigma / alpha
    theirs.timesteps = torch.arange(nfe, 0, -1)
    expected = x
    for i, step in enumerate(theirs.timesteps):
        expected = theirs.step(denoiser(expected, times[i])[0], step, expected).prev_sample

    out = dpm_solver_pp_2m(denoiser, x, schedule, nfe)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("solver", "schedule", "order", "nfe"),
    [
        (dpm_solver_fast, "vp", 3, 50),
        (dpm_solver_pp_fast, "cosine", 3, 200),
        (dpm_solver_pp_2m, "vp", 2, 40),
        (dpm_solver_pp_2m, "cosine", 2, 40),
        (dpm_solver_pp_2m, "linear", 2, 40),
    ],
)
def test_error_against_the_closed_form_falls_with_the_solvers_order(solver, schedule, order, nfe):
    denoiser, x = problem(schedule)
    exact = denoiser.exact(x)
    coarse, fine = ((solver(denoiser, x, denoiser.schedule, n) - exact).abs().max() for n in (nfe, 4 * nfe))
    assert math.log(coarse / fine, 4) > order - 0.4


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_evaluations_are_refused(solver):
    denoiser, x = problem("vp")
    with pytest.raises(ValueError, match="nfe=0"):
        SOLVERS[solver](denoiser, x, denoiser.schedule, 0)
