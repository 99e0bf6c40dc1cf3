"""The vision transformer of Masked Siamese Networks (MSN, arXiv 2204.07141) and its checkpoints."""

import math
from functools import partial
from pathlib import Path

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from dpt_ray.models.weights import load_strict, load_weights

HEAD_DIM = 64  # of every published MSN size (S/16, B/16, B/8, B/4, L/16, L/7)


class MsnVit(nn.Module):
    """ViT with a CLS token, learned positions, qkv bias and LayerNorm eps 1e-6.

    Parameter names are the published ones. `image_size` fixes the position grid; images of another
    size get interpolated positions.
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
        """CLS token after each of the last `blocks` blocks, before the final norm: (B, blocks*dim).

        x is (B, C, H, W), normalised; the tokens are concatenated in block order. This is the
        frozen feature that MSN's low-shot evaluation and DPT's stage 1 use.
        """
        tokens, classes = self._embed(x), []
        first = len(self.blocks) - blocks
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number >= first:
                classes.append(tokens[:, 0].clone())  # a view would keep all tokens of the block in memory
        return torch.cat(classes, dim=1)

    def normed(self, x: Tensor) -> Tensor:
        """CLS token after the final norm, the input of MSN's projection head: (B, dim)."""
        return self.norm(self(x))

    def _embed(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        cls = self.cls_token.expand(len(x), -1, -1)
        return torch.cat([cls, patches], dim=1) + self._positions(patches.shape[1])

    def _positions(self, count: int) -> Tensor:
        """Positions for CLS and `count` patches, bicubic by scale factor where the count differs."""
        own = self.pos_embed.shape[1] - 1
        if count == own:
            return self.pos_embed
        side = math.isqrt(own)
        grid = self.pos_embed[:, 1:].reshape(1, side, side, self.dim).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, scale_factor=math.sqrt(count / own), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def msn_vit(tensors: dict[str, Tensor], source: str | Path, heads: int | None = None) -> MsnVit:
    """The network whose weights are `tensors`, under the published names without prefix.

    Sizes are read off the shapes; `heads`, which no shape shows, is dim / 64 unless given. Raises
    ValueError naming `source` and the keys that are missing or unexpected.
    """
    if not {"patch_embed.proj.weight", "pos_embed"} <= tensors.keys():
        raise ValueError(f"{source}: not an MSN vision transformer: no patch_embed or pos_embed")
    dim, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    heads = heads or dim // HEAD_DIM
    if heads == 0 or dim % heads:
        raise ValueError(f"{source}: {heads} heads do not divide dim {dim}; give heads")
    image_size = math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch_size
    network = MsnVit(image_size, patch_size, channels, dim, depth, heads)
    load_strict(network, tensors, source)
    return network


def load_msn(path: str | Path, heads: int | None = None) -> MsnVit:
    """The target encoder of a published MSN checkpoint such as `vitb4_300ep.pth.tar`.

    The projection head (`fc.*`) is left out; every other key must be there and known.
    """
    prefix = "module."
    named = load_weights(path, section="target_encoder")
    bare = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return msn_vit({n: t for n, t in bare.items() if not n.startswith("fc.")}, path, heads)
