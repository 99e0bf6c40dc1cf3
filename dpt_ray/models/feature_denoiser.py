"""A denoiser of feature vectors: a residual MLP with adaLN on time and class.

Blocks as in the diffusion head of MAR (arXiv 2406.11838, Sec. 4.2), gates at 0 in the beginning as in DiT
(adaLN-Zero, arXiv 2212.09748).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypedDict

from safetensors.torch import save_file
from torch import Tensor, nn

from dpt_ray.models.saved import CONFIG, WEIGHTS
from dpt_ray.models.uvit import time_sinusoid
from dpt_ray.models.weights import load_strict, load_weights
from dpt_ray.store.artifact import Artifact

MEAN, STD = "mean", "std"  # beside the weights, so no parameter may have such a name
# Flow matching (arXiv 2210.02747): the names in diffusion/ of what the network is trained with.
SCHEDULE = "linear"
PREDICTION: Literal["flow"] = "flow"


@dataclass(frozen=True)
class FeatureDenoiserConfig:
    """The architecture: features of length `dim`, `depth` blocks of `width`; the null class is num_classes.

    Raises ValueError for an odd width: half of the time's embedding are cosines, half sines.
    """

    dim: int
    width: int
    depth: int
    num_classes: int

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width={self.width} must be even: half are cosines of time, half sines")


class Block(nn.Module):
    """x + gate * MLP(modulated norm of x): x and condition (B, width) -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the transformed rows."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        hidden = self.norm(x) * (1 + scale) + shift
        return x + gate * self.fc2(nn.functional.silu(self.fc1(hidden)))


class FeatureDenoiser(nn.Module):
    """The network; its output is the velocity eps - x_0 at x = (1 - t) x_0 + t eps, its time 1000 t."""

    def __init__(self, config: FeatureDenoiserConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(config.dim, width)
        self.label_emb = nn.Embedding(config.num_classes + 1, width)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.dim)
        self._initialise()

    def _initialise(self) -> None:
        # Label embeddings keep torch's N(0, 1), as large as those of time: in few steps small ones, usual in
        # long trainings, would stay unheard.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name.startswith("blocks") and name.endswith("modulation"):
                    nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Return the velocity (B, dim) at x (B, dim) for network time (B,) in 0..1000 and labels (B,)."""
        time_token = self.time_embed(time_sinusoid(time, self.config.width).to(x.dtype))
        condition = nn.functional.silu(time_token + self.label_emb(labels))
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        t = (time / 1000)[:, None]
        # E[eps - x_0 | x] = (t - (1 - t)) / ((1 - t)^2 + t^2) x for x_0 ~ N(0, 1): what features have without
        # their class and their correlations. The layers learn the rest, and may be narrower than x.
        known = (2 * t - 1) / ((1 - t).square() + t.square()) * x
        return known + self.out(self.norm(hidden) * (1 + scale) + shift)


def flops(config: FeatureDenoiserConfig) -> int:
    """Return the FLOPs of one forward pass for one row, a multiply-add counted as two."""
    # A block: fc1, fc2 and its modulation; besides, two layers for time, the last modulation, both ends.
    return 2 * ((5 * config.depth + 4) * config.width**2 + 2 * config.dim * config.width)


class Description(TypedDict):
    """`config.json` of a feature denoiser: `model` are the fields of a `FeatureDenoiserConfig`."""

    model: dict[str, int]
    schedule: str
    prediction: Literal["noise", "v", "flow"]
    steps: int


def save_feature_denoiser(
    folder: Path,
    weights: Mapping[str, Tensor],
    mean: Tensor,
    std: Tensor,
    config: FeatureDenoiserConfig,
    steps: int,
) -> None:
    """Write the weights with the features' mean and deviation (dim,), and `config.json`."""
    tensors = {**weights, MEAN: mean, STD: std}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    told: Description = {
        "model": asdict(config),
        "schedule": SCHEDULE,
        "prediction": PREDICTION,
        "steps": steps,
    }
    (folder / CONFIG).write_text(json.dumps(told, indent=1) + "\n")


@dataclass(frozen=True)
class SavedFeatureDenoiser:
    """A feature denoiser on the CPU with the mean and deviation (dim,) of what it was trained on."""

    network: FeatureDenoiser
    mean: Tensor
    std: Tensor
    told: Description


def load_feature_denoiser(folder: str) -> SavedFeatureDenoiser:
    """Return the feature denoiser of a folder, local or a URI."""
    told: Description = Artifact(folder).read_json(CONFIG)
    network = FeatureDenoiser(FeatureDenoiserConfig(**told["model"]))
    weights = f"{folder}/{WEIGHTS}"
    tensors = load_weights(weights)
    mean, std = tensors.pop(MEAN), tensors.pop(STD)
    load_strict(network, tensors, weights)
    return SavedFeatureDenoiser(network.eval().requires_grad_(False), mean, std, told)
