"""What GPUs and storage cost: a file of the user's own, for `dpt plan --prices`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from dpt_ray.config.hashing import Section
from dpt_ray.config.values import Positive
from dpt_ray.config.yaml_file import build, read_yaml


class GPU(Section):
    """A kind of GPU: dense bfloat16 TFLOP/s by its data sheet, and the price of an hour."""

    tflops: Positive
    hour: Positive


class Prices(Section):
    """Prices by kind of GPU, and of a terabyte stored for a month, in one currency."""

    currency: str = "USD"
    gpus: Annotated[dict[str, GPU], Field(min_length=1)]
    storage_tb_month: Annotated[float, Field(ge=0)] = 0.0


def load_prices(path: Path) -> Prices:
    """Return the prices in a YAML file. Raises ConfigError."""
    return build(Prices, read_yaml(path), str(path))
