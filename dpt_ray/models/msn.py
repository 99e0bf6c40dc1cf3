"""The vision transformer of Masked Siamese Networks (MSN, arXiv 2204.07141) and its checkpoints."""

import math
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from dpt_ray.models.weights import load_strict, load_weights

HEAD_DIM = 64  # in all published sizes (S/16, B/16, B/8, B/4, L/16, L/7)


class MsnVit(nn.Module):
    """ViT with a CLS token, learned positions, qkv bias and LayerNorm eps 1e-6.

    Parameter names are the published ones. `image_size` sets the grid of position embeddings, which
    are interpolated for images of another size.
    """

    def __init__(
        self, image_size: int, patch_size: int, channels: int, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.dim, self.image_size, self.heads = dim, image_size, heads
        self.patch_embed = PatchEmbed(image_size, patch_size, channels, dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(dim)

    def forward(self, x: Tensor, blocks: int = 1) -> Tensor:
        """Return the CLS tokens of the last `blocks` blocks, concatenated in order: (B, blocks*dim).

        x (B, C, H, W) is normalised; the final norm is not applied. This is the frozen feature of
        MSN's low-shot evaluation and of DPT's stage 1.
        """
        tokens, classes = self._embed(x), []
        first = len(self.blocks) - blocks
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number >= first:
                classes.append(tokens[:, 0].clone())  # a view would keep all of the block's tokens alive
        return torch.cat(classes, dim=1)

    def _embed(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        cls = self.cls_token.expand(len(x), -1, -1)
        return torch.cat([cls, patches], dim=1) + self._positions(patches.shape[1])

    def _positions(self, count: int) -> Tensor:
        """Return position embeddings for CLS and `count` patches, interpolated where needed (bicubic)."""
        own = self.pos_embed.shape[1] - 1
        if count == own:
            return self.pos_embed
        side = math.isqrt(own)
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) d -> 1 d h w", h=side)
        # By scale factor and not by size, as published: the two sample at other points.
        grid = functional.interpolate(grid, scale_factor=math.sqrt(count / own), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)


def msn_vit(tensors: dict[str, Tensor], source: str | Path, heads: int | None = None) -> MsnVit:
    """Return the network with weights `tensors`, under the published names without prefix.

    Sizes follow from the shapes, except `heads`, which defaults to dim / 64. Raises ValueError naming
    `source` and the missing or unexpected keys.
    """
    if not {"patch_embed.proj.weight", "pos_embed"} <= tensors.keys():
        raise ValueError(f"{source}: not an MSN vision transformer: no patch_embed or pos_embed")
    dim, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    heads = heads or dim // HEAD_DIM
    if heads == 0 or dim % heads:
        raise ValueError(
            f"{source}: {heads} heads do not divide dim {dim}; set encoder.heads to the checkpoint's number "
            "of attention heads"
        )
    image_size = math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch_size
    network = MsnVit(image_size, patch_size, channels, dim, depth, heads)
    load_strict(network, tensors, source)
    return network


def load_msn(path: str | Path, heads: int | None = None) -> MsnVit:
    """Return the target encoder of a published MSN checkpoint such as `vitb4_300ep.pth.tar`.

    The projection head (`fc.*`) is ignored; missing or unknown keys raise ValueError.
    """
    prefix = "module."
    named = load_weights(path, section="target_encoder")
    bare = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return msn_vit({n: t for n, t in bare.items() if not n.startswith("fc.")}, path, heads)
