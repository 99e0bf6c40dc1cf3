"""ODE solvers: pure functions (denoiser, x, schedule, nfe) -> sample, deterministic.

DPM-Solver (arXiv 2206.00927) integrates the noise prediction exactly against exp(-lambda),
DPM-Solver++ (arXiv 2211.01095) the data prediction against exp(lambda). One formula covers both:
alpha and sigma exchange roles and lambda changes sign. Schedule values are float64 scalars on the
CPU, so no step waits for the device.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from math import expm1

import torch
from torch import Tensor

from dpt_ray.diffusion.schedules import Schedule

# (x (B, C, H, W), t in (0, 1]) -> (eps, x_0), both like x
Denoiser = Callable[[Tensor, float], tuple[Tensor, Tensor]]
Solver = Callable[[Denoiser, Tensor, Schedule, int], Tensor]


def dpm_solver_fast(denoiser: Denoiser, x: Tensor, schedule: Schedule, nfe: int) -> Tensor:
    """Return the sample of single-step DPM-Solver "fast" (noise prediction), shape of x.

    Steps uniform in lambda; 50 evaluations are 16 steps of order 3 and one of order 2. x is
    standard normal noise. Source: DPM-Solver-fast, arXiv 2206.00927 (U-ViT-L).
    """
    orders = _fast_orders(nfe)
    ends = _lambda_uniform_times(schedule, schedule.t_start, schedule.t_end, len(orders))
    for order, start, end in zip(orders, ends[:-1], ends[1:], strict=True):
        times = _lambda_uniform_times(schedule, start, end, order)
        x = _single_step(denoiser, x, schedule, times, predict_data=False)
    return x


def dpm_solver_pp_fast(denoiser: Denoiser, x: Tensor, schedule: Schedule, nfe: int) -> Tensor:
    """Return the sample of single-step DPM-Solver++ "fast" (data prediction), shape of x.

    The grid has nfe intervals uniform in time; a step of order k spans k of them and evaluates at
    the points in between. x is standard normal noise. Source: arXiv 2211.01095, with the grid of the
    published U-ViT-H's sampling.
    """
    grid = torch.linspace(schedule.t_start, schedule.t_end, nfe + 1, dtype=torch.float64).tolist()
    for first, last in pairwise(accumulate(_fast_orders(nfe), initial=0)):
        x = _single_step(denoiser, x, schedule, grid[first : last + 1], predict_data=True)
    return x


def dpm_solver_pp_2m(denoiser: Denoiser, x: Tensor, schedule: Schedule, nfe: int) -> Tensor:
    """Return the sample of second-order multistep DPM-Solver++, shape of x.

    nfe steps uniform in lambda, the first and, for stability, the last of first order. x is
    standard normal noise.
    Source: arXiv 2211.01095, Algorithm 2.
    """
    _check_nfe(nfe)
    times = _lambda_uniform_times(schedule, schedule.t_start, schedule.t_end, nfe)
    alpha, sigma, lam = _schedule_values(schedule, times)
    previous = x
    for i in range(nfe):
        h = lam[i + 1] - lam[i]
        _, data = denoiser(x, times[i])
        direction = data
        if 0 < i < nfe - 1:
            # D_i = (1 + 1 / (2 r)) x_i - 1 / (2 r) x_{i-1}, with the data predictions x
            r = (lam[i] - lam[i - 1]) / h
            direction = data + (data - previous) / (2 * r)
        # x <- sigma_{i+1} / sigma_i x - alpha_{i+1} (e^{-h} - 1) D_i
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * expm1(-h) * direction
        previous = data
    return x


SOLVERS: dict[str, Solver] = {
    "dpm_solver_fast": dpm_solver_fast,
    "dpm_solver_pp_fast": dpm_solver_pp_fast,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
}


def _single_step(
    denoiser: Denoiser, x: Tensor, schedule: Schedule, times: list[float], predict_data: bool
) -> Tensor:
    """Return x after one step of order len(times) - 1, evaluated at all times but the last.

    DPM-Solver-1, -2 and -3 with inner points anywhere (arXiv 2206.00927).
    `decay` scales x, `gain` the prediction; `clock` is lambda for the noise prediction and -lambda
    for the data prediction.
    """
    alpha, sigma, lam = _schedule_values(schedule, times)
    decay, gain, clock = (alpha, sigma, lam)
    if predict_data:
        decay, gain, clock = (sigma, alpha, [-value for value in lam])
    h = [value - clock[0] for value in clock]

    def predict(x: Tensor, t: float) -> Tensor:
        return denoiser(x, t)[1 if predict_data else 0]

    def first_order(i: int) -> Tensor:
        # alpha_i / alpha_0 x - sigma_i (e^{h_i} - 1) m_0
        return decay[i] / decay[0] * x - gain[i] * expm1(h[i]) * m0

    m0 = predict(x, times[0])
    if len(times) == 2:
        return first_order(1)
    m1 = predict(first_order(1), times[1])
    if len(times) == 3:
        # order 2: ... - sigma (e^h - 1) (m_1 - m_0) / (2 r_1), r_1 = h_1 / h
        return first_order(2) - 0.5 * h[2] / h[1] * gain[2] * expm1(h[2]) * (m1 - m0)
    # order 3: ... - sigma ((e^h - 1) / h - 1) (m_i - m_0) / r_i, for the second point and the end
    x2 = first_order(2) - h[2] / h[1] * gain[2] * (expm1(h[2]) / h[2] - 1) * (m1 - m0)
    m2 = predict(x2, times[2])
    return first_order(3) - h[3] / h[2] * gain[3] * (expm1(h[3]) / h[3] - 1) * (m2 - m0)


def _fast_orders(nfe: int) -> list[int]:
    """Return the orders of the steps that take exactly nfe evaluations (arXiv 2206.00927)."""
    _check_nfe(nfe)
    thirds, rest = divmod(nfe, 3)
    if rest == 0:
        return [3] * (thirds - 1) + [2, 1]
    return [3] * thirds + [rest]


def _lambda_uniform_times(schedule: Schedule, start: float, end: float, steps: int) -> list[float]:
    """Return steps + 1 times from start to end, equally spaced in lambda."""
    first, last = schedule.log_snr_half(torch.tensor([start, end], dtype=torch.float64)).tolist()
    lambdas = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return schedule.time_at(lambdas).tolist()


def _schedule_values(schedule: Schedule, times: list[float]) -> tuple[list[float], list[float], list[float]]:
    """Return alpha, sigma and lambda at the times, as floats."""
    t = torch.tensor(times, dtype=torch.float64)
    return schedule.alpha(t).tolist(), schedule.sigma(t).tolist(), schedule.log_snr_half(t).tolist()


def _check_nfe(nfe: int) -> None:
    if nfe < 1:
        raise ValueError(f"nfe={nfe} must be at least 1 network evaluation")
