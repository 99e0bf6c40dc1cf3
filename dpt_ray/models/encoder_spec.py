"""What an encoder is besides its weights, and what a kind of encoders has to provide."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from dpt_ray.data.crops import Crop
from dpt_ray.store.artifact import local_copy


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder's description besides its weights; `config.json` of an encoder folder.

    `mean` and `std` are per channel, of pixels in [0, 1]. `width` is for kinds conv and resnet, `heads` and
    `blocks` (the feature concatenates the CLS tokens of the last `blocks` blocks) for kind msn.
    `patch_size` is for a timm vision transformer that was trained here, on images of the crop's size.
    """

    kind: str
    name: str
    dim: int
    crop: Crop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int = 0
    heads: int = 0
    blocks: int = 1
    patch_size: int = 0

    def save(self, path: Path) -> None:
        """Write the spec as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EncoderSpec:
        """Return the spec of a JSON file. Raises ValueError where keys are missing or unknown."""
        try:
            values = json.loads(local_copy(path).read_text())
            values["crop"] = Crop(**values["crop"])
            values["mean"], values["std"] = tuple(values["mean"]), tuple(values["std"])
            return cls(**values)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not an encoder's config.json ({error}); write it with save_encoder"
            ) from error


@dataclass(frozen=True)
class Source:
    """Where a published encoder comes from.

    `weights` is a path or URI; for a timm model it defaults to the published ones (`timm_weights`).
    `blocks` and `heads` are for MSN only, `image_size` (None: that of the weights) for timm only.
    """

    name: str | None = None
    weights: str | Path | None = None
    blocks: int = 1
    heads: int | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class EncoderKind:
    """How encoders of a kind are loaded from their folder and, if published ones exist, opened.

    `load(spec, tensors, source)` returns the network with the weights `tensors`, read from `source`.
    """

    load: Callable[[EncoderSpec, dict[str, Tensor], str], nn.Module]
    open: Callable[[Source], tuple[nn.Module, EncoderSpec]] | None = None
