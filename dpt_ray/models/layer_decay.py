"""Layer-wise decay of the learning rate, as BEiT (arXiv 2106.08254) and Semi-ViT (arXiv 2208.05688) use it.

timm's `param_groups_layer_decay` is not used: it gives the last norm the rate of the last block and not of
the head, counts one layer less for an encoder without a head, and knows timm's own networks only.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from dpt_ray.training.optimizer import ParameterGroup

_BLOCK = re.compile(r"(?:blocks|stages)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:cls_token|reg_token|pos_embed|patch_embed|norm_pre|stem|conv_stem|bn1)\b")
_UNDECAYED = ("cls_token", "reg_token", "pos_embed")


def layer_decay_groups(
    model: nn.Module, encoder: nn.Module, decay: float, weight_decay: float
) -> list[ParameterGroup]:
    """Return groups of the trainable parameters of `model`, of which `encoder` is a part.

    The encoder's L blocks are its `blocks` or `stages`; everything of the model that is neither in a block
    nor an embedding belongs to the head. `decay` 1 scales nothing. Weight decay is 0 for vectors (biases,
    norms), position embeddings and class tokens. Raises ValueError for a decay outside (0, 1] and, below 1,
    for an encoder without blocks.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay {decay}: must lie above 0 and be at most 1")
    own = {id(parameter): name for name, parameter in encoder.named_parameters()}
    numbers = [int(found[1]) for name in own.values() if (found := _BLOCK.match(name))]
    if not numbers and decay < 1:
        raise ValueError(
            f"layer_decay {decay}: {type(encoder).__name__} has neither blocks nor stages; set it to 1, or "
            "choose a vision transformer"
        )
    head = max(numbers, default=-1) + 2  # L + 1
    groups: dict[tuple[int, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = own.get(id(parameter))
            layer = head if inner is None else _layer(inner, head)
            key = layer, weight_decay if _is_decayed(inner or name, parameter) else 0.0
            groups.setdefault(key, []).append(name)
    # lr(id) = lr decay^(L + 1 - id)
    return [ParameterGroup(names, decay ** (head - layer), wd) for (layer, wd), names in groups.items()]


def _layer(name: str, head: int) -> int:
    """Return the layer id of an encoder's parameter: embeddings 0, block i has i + 1, the rest `head`."""
    if found := _BLOCK.match(name):
        return int(found[1]) + 1
    return 0 if _EMBEDDING.match(name) else head


def _is_decayed(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and name not in _UNDECAYED
