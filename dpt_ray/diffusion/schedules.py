"""Noise schedules x_t = alpha(t) x_0 + sigma(t) eps, t in (0, 1], in half log-SNR lambda(t).

lambda(t) = log(alpha / sigma) is the variable in which DPM-Solver (arXiv 2206.00927) works; each
schedule therefore gives lambda and its inverse. Methods keep the dtype and device of their input:
solvers call them with float64, training with float32.
"""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Schedule(Protocol):
    """What loss, guidance and solvers need of a schedule; t and lambda are tensors of any shape."""

    @property
    def t_start(self) -> float:
        """The t at which sampling starts (most noise)."""
        ...

    @property
    def t_end(self) -> float:
        """The t at which sampling ends (least noise)."""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """Return the scale of the data."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Return the scale of the noise."""
        ...

    def log_snr_half(self, t: Tensor) -> Tensor:
        """Return lambda(t) = log(alpha / sigma), decreasing in t."""
        ...

    def time_at(self, log_snr_half: Tensor) -> Tensor:
        """Return the t at which lambda(t) has this value."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """Return the network's time input for t."""
        ...

    def training_times(self, u: Tensor) -> Tensor:
        """Return the training t for u uniform in [0, 1)."""
        ...


class _FromLogAlpha:
    """alpha, sigma and lambda of a variance-preserving schedule given by log alpha."""

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        """Return the scale of the data."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Return sqrt(1 - alpha^2), through expm1 because alpha is close to 1 at small t."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def log_snr_half(self, t: Tensor) -> Tensor:
        """Return lambda(t) = log(alpha / sigma)."""
        return self.log_alpha(t) - self.sigma(t).log()


def _log_alpha_at(log_snr_half: Tensor) -> Tensor:
    """Return log alpha at lambda where alpha^2 + sigma^2 = 1."""
    # alpha^2 = sigmoid(2 lambda)
    return 0.5 * nn.functional.logsigmoid(2 * log_snr_half)


@dataclass(frozen=True)
class ContinuousVP(_FromLogAlpha):
    """Variance-preserving SDE with linear beta (arXiv 2011.13456): U-ViT-L at 256."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_start: float = 1.0
    t_end: float = 1e-4

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return -1/2 of the integral of beta from 0 to t."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def time_at(self, log_snr_half: Tensor) -> Tensor:
        """Return the positive root of the quadratic in `log_alpha`, without cancellation."""
        negative = -4 * _log_alpha_at(log_snr_half)
        slope = self.beta_max - self.beta_min
        return negative / (self.beta_min + (self.beta_min**2 + slope * negative).sqrt())

    def network_time(self, t: Tensor) -> Tensor:
        """Return 999 t."""
        return 999 * t

    def training_times(self, u: Tensor) -> Tensor:
        """Return u itself: t ~ U(0, 1)."""
        return u


_SD_STEPS = 1000


@functools.cache
def _sd_log_alpha(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return log alpha at t = n/1000, n = 1..1000; cached per device, so that no step copies it."""
    # log alpha_n = 1/2 sum_{k <= n} log(1 - beta_k), sqrt(beta) linear
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), _SD_STEPS, dtype=torch.float64)
    return (0.5 * torch.log1p(-(betas**2)).cumsum(0)).to(device, dtype)


@dataclass(frozen=True)
class StableDiffusionDiscrete(_FromLogAlpha):
    """Stable Diffusion's 1000 betas, log alpha linear in between (DPM-Solver): U-ViT-H at 256."""

    t_start: float = 1.0
    t_end: float = 1 / _SD_STEPS

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return log alpha, interpolated linearly between t = n/1000."""
        table = _sd_log_alpha(t.device, t.dtype)
        left = (t * _SD_STEPS - 1).floor().clamp(0, _SD_STEPS - 2).long()
        return torch.lerp(table[left], table[left + 1], t * _SD_STEPS - 1 - left)

    def time_at(self, log_snr_half: Tensor) -> Tensor:
        """Return the inverse of the same interpolation."""
        falling = -_sd_log_alpha(log_snr_half.device, log_snr_half.dtype)
        value = -_log_alpha_at(log_snr_half)
        left = (torch.searchsorted(falling, value.contiguous()) - 1).clamp(0, _SD_STEPS - 2)
        part = (value - falling[left]) / (falling[left + 1] - falling[left])
        return (left + 1 + part) / _SD_STEPS

    def network_time(self, t: Tensor) -> Tensor:
        """Return n = 1000 t."""
        return _SD_STEPS * t

    def training_times(self, u: Tensor) -> Tensor:
        """Return n/1000 with n uniform in 1..1000."""
        return ((u * _SD_STEPS).floor().clamp(max=_SD_STEPS - 1) + 1) / _SD_STEPS


_COSINE_T_START = 2 / math.pi * math.atan(math.exp(5.1))


@dataclass(frozen=True)
class Cosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (arXiv 2102.09672 without offset).

    Restricted to -5.1 <= lambda <= 5.1: towards t = 1 lambda is unbounded, and steps uniform in
    lambda that start lower are spent on pure noise and give far worse samples.
    """

    t_start: float = _COSINE_T_START
    t_end: float = 1 - _COSINE_T_START

    def alpha(self, t: Tensor) -> Tensor:
        """Return the scale of the data."""
        return (0.5 * math.pi * t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        """Return the scale of the noise."""
        return (0.5 * math.pi * t).sin()

    def log_snr_half(self, t: Tensor) -> Tensor:
        """Return lambda(t) = -log tan(pi t / 2)."""
        return -(0.5 * math.pi * t).tan().log()

    def time_at(self, log_snr_half: Tensor) -> Tensor:
        """Return t = 2/pi atan(exp(-lambda))."""
        return 2 / math.pi * (-log_snr_half).exp().atan()

    def network_time(self, t: Tensor) -> Tensor:
        """Return 1000 t."""
        return 1000 * t

    def training_times(self, u: Tensor) -> Tensor:
        """Return t uniform over the range that sampling visits."""
        return self.t_end + (self.t_start - self.t_end) * u


@dataclass(frozen=True)
class Linear:
    """Flow matching: alpha = 1 - t, sigma = t (arXiv 2210.02747, SiT arXiv 2401.08740)."""

    t_start: float = 0.999
    t_end: float = 0.001

    def alpha(self, t: Tensor) -> Tensor:
        """Return the scale of the data."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """Return the scale of the noise."""
        return t

    def log_snr_half(self, t: Tensor) -> Tensor:
        """Return lambda(t) = log((1 - t) / t)."""
        return -torch.logit(t)

    def time_at(self, log_snr_half: Tensor) -> Tensor:
        """Return t = sigmoid(-lambda)."""
        return torch.sigmoid(-log_snr_half)

    def network_time(self, t: Tensor) -> Tensor:
        """Return 1000 t."""
        return 1000 * t

    def training_times(self, u: Tensor) -> Tensor:
        """Return t uniform over the range that sampling visits."""
        return self.t_end + (self.t_start - self.t_end) * u


SCHEDULES: dict[str, Schedule] = {
    "vp": ContinuousVP(),
    "stable_diffusion": StableDiffusionDiscrete(),
    "cosine": Cosine(),
    "linear": Linear(),
}
