"""The diffusion training loss and the conversions between what a network may predict.

With x_t = alpha x_0 + sigma eps a network predicts one of
    "noise"  eps                       (DDPM, arXiv 2006.11239, Eq. 14; the paper's choice)
    "v"      alpha eps - sigma x_0     (arXiv 2202.00512, Sec. 4)
    "flow"   eps - x_0                 (flow matching, arXiv 2210.02747; SiT, arXiv 2401.08740)
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from dpt_ray.diffusion.schedules import Schedule

Prediction = Literal["noise", "v", "flow"]
PREDICTIONS: tuple[Prediction, ...] = ("noise", "v", "flow")

# (x (B, C, H, W), network time (B,), labels (B,) int64) -> prediction (B, C, H, W)
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def latents_from_moments(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Return scaled latents scale * (mean + std * noise), (B, C, H, W).

    moments (B, 2C, H, W) is mean and log-variance, unscaled, as an autoencoder gives them;
    noise (B, C, H, W) standard normal; scale 0.18215 for Stable Diffusion (arXiv 2112.10752).
    """
    mean, log_variance = moments.chunk(2, dim=1)
    # z = scale (mu + exp(log sigma^2 / 2) eps), log sigma^2 clamped as in LDM
    std = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
    return scale * (mean + std * noise)


def training_loss(
    network: Network,
    latents: Tensor,
    labels: Tensor,
    t: Tensor,
    noise: Tensor,
    schedule: Schedule,
    prediction: Prediction,
) -> Tensor:
    """Return each sample's mean squared error in float32, (B,).

    latents and noise (B, C, H, W), labels (B,) with dropped ones already null, t (B,) in (0, 1].
    """
    # x_t = alpha x_0 + sigma eps
    alpha, sigma = _scales(t, schedule, latents)
    x = alpha * latents + sigma * noise
    output = network(x, schedule.network_time(t), labels)
    target = _target(prediction, latents, noise, alpha, sigma)
    return (output.float() - target.float()).square().flatten(1).mean(dim=1)


def _target(prediction: Prediction, data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    if prediction == "noise":
        return noise
    if prediction == "v":
        return alpha * noise - sigma * data
    if prediction == "flow":
        return noise - data
    raise _unknown(prediction)


def to_noise_and_data(
    prediction: Prediction, output: Tensor, x: Tensor, t: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Return (eps, x_0), both (B, C, H, W), from the network's output at x and t.

    t is (B,) or a scalar tensor, in (0, 1]. Each line solves the module's definitions for the two.
    """
    alpha, sigma = _scales(t, schedule, x)
    if prediction == "noise":
        return output, (x - sigma * output) / alpha
    if prediction == "v":
        norm = alpha**2 + sigma**2  # 1 where the schedule preserves variance
        return (sigma * x + alpha * output) / norm, (alpha * x - sigma * output) / norm
    if prediction == "flow":
        data = (x - sigma * output) / (alpha + sigma)
        return data + output, data
    raise _unknown(prediction)


def min_snr_weight(t: Tensor, schedule: Schedule, prediction: Prediction, gamma: float = 5.0) -> Tensor:
    """Return the weight (B,) of each sample's loss: min(SNR, gamma) on the error of x_0.

    Min-SNR-gamma (arXiv 2303.09556). The loss is a multiple of the error of x_0, by
    (alpha/sigma)^2, ((alpha^2 + sigma^2)/sigma)^2 and ((alpha + sigma)/sigma)^2 for noise, v and
    flow; the weight divides by it.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if prediction == "noise":
        factor = alpha / sigma
    elif prediction == "v":
        factor = (alpha**2 + sigma**2) / sigma
    elif prediction == "flow":
        factor = (alpha + sigma) / sigma
    else:
        raise _unknown(prediction)
    return (alpha / sigma).square().clamp(max=gamma) / factor**2


def _scales(t: Tensor, schedule: Schedule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma in the dtype of x, shaped to broadcast over (B, C, H, W)."""
    if t.dim():  # a scalar stays 0-dimensional: only then may it be on the CPU while x is not
        t = t.reshape(-1, *[1] * (x.dim() - 1))
    return schedule.alpha(t).to(x.dtype), schedule.sigma(t).to(x.dtype)


def _unknown(prediction: str) -> ValueError:
    return ValueError(f"prediction={prediction!r} is unknown: use one of {', '.join(PREDICTIONS)}")
