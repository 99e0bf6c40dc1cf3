"""Classifier-free guidance (arXiv 2207.12598) as a denoiser that solvers call."""

import torch
from torch import Tensor

from dpt_ray.diffusion.loss import Network, Prediction, to_noise_and_data
from dpt_ray.diffusion.schedules import Schedule
from dpt_ray.diffusion.solvers import Denoiser


def guided_denoiser(
    network: Network,
    schedule: Schedule,
    labels: Tensor,
    prediction: Prediction,
    guidance: float,
    null_class: int,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Return (x, t) -> (eps, x_0) for these labels (B,), guided by w = `guidance`.

    The output is u + w (c - u) of the conditional c and the unconditional u, from one forward of
    2B; w = 1 means no guidance and one forward of B (the paper's s is w - 1). With `interval`
    (t_lo, t_hi), guidance applies only where t_lo <= t <= t_hi (arXiv 2404.07724).
    Raises ValueError for an empty interval.
    """
    if interval is not None and not interval[0] < interval[1]:
        raise ValueError(f"interval={interval} is empty: give (t_lo, t_hi) with t_lo < t_hi")
    both_labels = torch.cat([labels, torch.full_like(labels, null_class)])

    def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        time = torch.tensor(t, dtype=torch.float64)
        network_time = float(schedule.network_time(time))
        if guidance != 1 and (interval is None or interval[0] <= t <= interval[1]):
            times = torch.full((2 * len(x),), network_time, device=x.device)
            conditional, unconditional = network(torch.cat([x, x]), times, both_labels).chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        else:
            times = torch.full((len(x),), network_time, device=x.device)
            output = network(x, times, labels)
        return to_noise_and_data(prediction, output.to(x.dtype), x, time, schedule)

    return denoise
