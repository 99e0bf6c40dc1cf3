"""Classifier-free guidance (arXiv 2207.12598) as a denoiser that solvers call."""

import torch
from torch import Tensor

from dpt_ray.diffusion.loss import Network, Prediction, to_noise_and_data
from dpt_ray.diffusion.schedules import Schedule
from dpt_ray.diffusion.solvers import Denoiser
from dpt_ray.models.precision import Precision, autocast


def guided_denoiser(
    network: Network,
    schedule: Schedule,
    labels: Tensor,
    prediction: Prediction,
    guidance: float,
    null_class: int,
    interval: tuple[float, float] | None = None,
    precision: Precision = "float32",
) -> Denoiser:
    """Return (x, t) -> (eps, x_0) for these labels (B,), guided by w = `guidance`.

    The output is u + w (c - u) of the conditional c and the unconditional u, from one forward of
    2B; w = 1 means no guidance and one forward of B (the paper's s is w - 1). With `interval`
    (t_lo, t_hi), guidance applies only where t_lo <= t <= t_hi (arXiv 2404.07724).
    `precision` is the network's; everything else is computed in the dtype of x.
    Raises ValueError for an empty interval.
    """
    if interval is not None and not interval[0] < interval[1]:
        raise ValueError(f"interval={interval} is empty: give (t_lo, t_hi) with t_lo < t_hi")
    both_labels = torch.cat([labels, torch.full_like(labels, null_class)])

    def predict(x: Tensor, time: float, labels: Tensor) -> Tensor:
        times = torch.full((len(x),), time, device=x.device)
        with autocast(x.device, precision):
            output = network(x, times, labels)
        return output.to(x.dtype)  # before c - u, whose cancellation bfloat16 does not survive

    def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        time = torch.tensor(t, dtype=torch.float64)
        network_time = float(schedule.network_time(time))
        if guidance != 1 and (interval is None or interval[0] <= t <= interval[1]):
            conditional, unconditional = predict(torch.cat([x, x]), network_time, both_labels).chunk(2)
            # u + w (c - u)
            output = unconditional + guidance * (conditional - unconditional)
        else:
            output = predict(x, network_time, labels)
        return to_noise_and_data(prediction, output, x, time, schedule)

    return denoise
