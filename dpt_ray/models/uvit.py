"""U-ViT, "All are Worth Words: A ViT Backbone for Diffusion Models" (arXiv 2209.12152).

Time and label enter as tokens beside the image patches; long skip connections join block i of the
first half to its mirror image in the second. Parameter names are the published ones, so that a
published state dict loads with `strict=True`. `modulation=True` adds what the paper does not have:
adaLN-Zero (DiT, arXiv 2212.09748) in every block, for networks trained in few steps.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UViTConfig:
    """The architecture of a U-ViT; sizes are those of the network's input, latents or pixels.

    depth counts the blocks around the middle one: depth/2 in, 1 mid, depth/2 out.
    num_classes counts the real classes; the null class (unconditional) is index num_classes. With 0
    the network knows no labels and has no token for them (num_classes = -1 in the public code).
    Raises ValueError where the sizes do not fit together.
    """

    image_size: int
    patch_size: int
    in_channels: int
    dim: int
    depth: int
    heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    final_conv: bool = True
    time_mlp: bool = False
    modulation: bool = False
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "in_channels", "dim", "depth", "heads")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_classes < 0:
            raise ValueError(f"num_classes={self.num_classes} must be at least 0")
        if self.modulation and not self.num_classes:
            raise ValueError("modulation=True needs classes: num_classes=0 has no label to condition on")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must be above 0")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: "
                "choose a patch size that divides it"
            )
        if self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} is not a multiple of heads={self.heads}: "
                "choose a number of heads that divides it"
            )
        if self.dim % 2:
            raise ValueError(f"dim={self.dim} must be even: half are cosines of time, half sines")
        if self.depth % 2:
            raise ValueError(
                f"depth={self.depth} must be even: each block before the middle has its partner "
                "after it (the middle block is not counted)"
            )

    @property
    def null_class(self) -> int:
        """Index of the null label, the last row of the label embedding; of no meaning without classes."""
        return self.num_classes

    @property
    def extra_tokens(self) -> int:
        """Number of tokens before the patches: [label, time], or [time] without classes."""
        return 2 if self.num_classes else 1

    @property
    def tokens(self) -> int:
        """Length of the token sequence: label, time and patches."""
        return (self.image_size // self.patch_size) ** 2 + self.extra_tokens


UVIT_L_256 = UViTConfig(32, 2, 4, dim=1024, depth=20, heads=16, num_classes=1000)
UVIT_H_256 = UViTConfig(32, 2, 4, dim=1152, depth=28, heads=16, num_classes=1000, final_conv=False)
PRESETS = {"uvit_l_256": UVIT_L_256, "uvit_h_256": UVIT_H_256}


def time_sinusoid(time: Tensor, dim: int) -> Tensor:
    """Return [cos(t w_0), ..., sin(t w_0), ...] with w_i = 10000^(-2i/dim): (B,) -> (B, dim)."""
    exponents = torch.arange(dim // 2, device=time.device, dtype=torch.float32) / (dim // 2)
    phases = time.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, by default without bias on q, k, v: (B, L, dim) -> (B, L, dim)."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended tokens."""
        q, k, v = rearrange(self.qkv(x), "b l (qkv h d) -> qkv b h l d", qkv=3, h=self.heads)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(attended, "b h l d -> b l (h d)"))


class Mlp(nn.Module):
    """Two-layer perceptron with exact GELU, applied to each token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens, same shape."""
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; `skip` adds the long skip's linear, `modulation` adaLN-Zero."""

    def __init__(self, config: UViTConfig, skip: bool = False) -> None:
        super().__init__()
        dim = config.dim
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        if config.modulation:
            self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, skip: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Return x + attention + MLP: x and skip (B, L, dim), condition (B, dim)."""
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        if condition is None:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        # adaLN-Zero (arXiv 2212.09748, Sec. 3.2): the gates start at 0, each block as the identity.
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition)[:, None].chunk(6, dim=-1)
        )  # fmt: skip
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PatchEmbed(nn.Module):
    """Linear embedding of p x p patches: (B, C, H, W) -> (B, H W / p^2, dim)."""

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return one token for each patch, row by row."""
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class UViT(nn.Module):
    """The network; what its output means (noise, v, velocity) is the loss's choice.

    Set `gradient_checkpointing = True` to recompute the blocks in the backward pass: less memory,
    about a third more work.
    """

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim, half = config.dim, config.depth // 2
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, dim)
        self.time_embed = _time_mlp(dim, 4 * dim) if config.time_mlp else nn.Identity()
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes + 1, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, dim))
        self.in_blocks = nn.ModuleList([Block(config) for _ in range(half)])
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList([Block(config, skip=True) for _ in range(half)])
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_channels)
        channels = config.in_channels
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.final_conv else nn.Identity()
        if config.modulation:
            self.condition_time = _time_mlp(dim, dim)
            self.modulation = nn.Linear(dim, 2 * dim)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise normally with std 0.02 as published; with modulation, Xavier as DiT (arXiv 2212.09748).

        A narrow network learns several times faster with the latter.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if self.config.modulation:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith("modulation"):
                    nn.init.zeros_(module.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Return the prediction (B, C, H, W) for x (B, C, H, W).

        time (B,) is the network time of the schedule (0 ... 1000); labels (B,) int64, the null
        class being `config.null_class`; a network without classes does not look at them.
        """
        return self.with_middle(x, time, labels)[0]

    def with_middle(self, x: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction and, beside it, the middle block's patch tokens (B, patches, dim)."""
        sinusoid = time_sinusoid(time, self.config.dim).to(x.dtype)
        extra, condition = [self.time_embed(sinusoid)], None
        if self.config.num_classes:
            label = self.label_emb(labels)
            extra = [label, *extra]
            if self.config.modulation:
                condition = nn.functional.silu(self.condition_time(sinusoid) + label)
        tokens = torch.cat([torch.stack(extra, dim=1), self.patch_embed(x)], dim=1) + self.pos_embed

        skips = []
        for block in self.in_blocks:
            tokens = self._run(block, tokens, None, condition)
            skips.append(tokens)
        tokens = middle = self._run(self.mid_block, tokens, None, condition)
        for block in self.out_blocks:
            tokens = self._run(block, tokens, skips.pop(), condition)

        patches = self.norm(tokens[:, self.config.extra_tokens :])
        if condition is not None:
            shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
            patches = patches * (1 + scale) + shift
        p, rows = self.config.patch_size, self.config.image_size // self.config.patch_size
        image = rearrange(self.decoder_pred(patches), "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)
        return self.final_layer(image), middle[:, self.config.extra_tokens :]

    def _run(self, block: nn.Module, x: Tensor, skip: Tensor | None, condition: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, skip, condition, use_reentrant=False)
        return block(x, skip, condition)


def _time_mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))


def flops(config: UViTConfig) -> int:
    """Return the FLOPs of one forward pass for one image, a multiply-add counted as two.

    Matrix products, attention and convolutions; norms and activations are left out.
    """
    dim, length, blocks = config.dim, config.tokens, config.depth + 1
    patches = length - config.extra_tokens
    patch_values = config.patch_size**2 * config.in_channels
    linears = 4 * dim**2 + 2 * dim * int(dim * config.mlp_ratio)  # qkv, proj, fc1, fc2
    attention = 2 * length * dim  # q k^T and its product with v, for each token
    multiply_adds = blocks * length * (linears + attention)
    multiply_adds += config.depth // 2 * length * 2 * dim**2  # skip_linear
    multiply_adds += 2 * patches * patch_values * dim  # patch_embed and decoder_pred
    if config.final_conv:
        multiply_adds += (3 * config.in_channels * config.image_size) ** 2
    if config.time_mlp:
        multiply_adds += 8 * dim**2
    if config.modulation:
        multiply_adds += 2 * dim**2 + blocks * 6 * dim**2 + 2 * dim**2
    return 2 * multiply_adds
