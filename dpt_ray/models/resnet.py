"""ResNet-18 for images of 32 to 64 pixels."""

from __future__ import annotations

from torch import Generator, Tensor, nn
from torch.nn import functional

from dpt_ray.models.conv import GROUPS, Residual, initialise

STAGES, BLOCKS = 4, 2


class ResNet(nn.Module):
    """Pre-activation ResNet-18 (He et al. 2016, arXiv 1603.05027) of small images: (B, C, H, W) -> (B, dim).

    As in SimCLR's experiments on CIFAR-10 the stem is a 3 x 3 convolution of stride 1 without pooling. Its
    four stages have width to 8 x width channels (64 to 512 in the paper), and a feature is the mean of the
    last one's, dim = 8 x width. Pixels are in [-1, 1]. `generator` draws the initial weights (default:
    torch's global state). Raises ValueError where `width` is not a multiple of 8.

    GroupNorm (arXiv 1803.08494) is in the place of batch normalisation, whose statistics would depend on how
    the batch is shared out among workers and accumulated parts, and whose averages are of no one model while
    the weights are averaged. Its kernels are fastest on contiguous tensors, so no memory format is set.
    """

    def __init__(self, channels_in: int, width: int, generator: Generator | None = None) -> None:
        super().__init__()
        if width % GROUPS:
            raise ValueError(f"width {width} must be a multiple of {GROUPS}")
        self.channels_in, self.width, self.dim = channels_in, width, width << (STAGES - 1)
        self.stem = nn.Conv2d(channels_in, width, 3, padding=1)
        self.stages = nn.Sequential(*(self._stage(number) for number in range(STAGES)))
        self.norm = nn.GroupNorm(GROUPS, self.dim)
        initialise(self, generator)

    def _stage(self, number: int) -> nn.Sequential:
        width = self.width << number
        first = Residual(width // 2, width, stride=2) if number else Residual(width, width, stride=1)
        return nn.Sequential(first, *(Residual(width, width, stride=1) for _ in range(BLOCKS - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, dim) of pixels (B, C, H, W) in [-1, 1]."""
        return functional.silu(self.norm(self.stages(self.stem(x)))).mean(dim=(2, 3))
