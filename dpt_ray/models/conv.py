"""A small convolutional encoder for images of 8 to 32 pixels."""

from torch import Generator, Tensor, nn
from torch.nn import functional

GROUPS = 8


class SmallConvNet(nn.Module):
    """Residual network of three stages, width to 4 x width channels: (B, C, H, W) -> (B, dim).

    Pixels are in [-1, 1]. GroupNorm makes an image's feature independent of the rest of its batch.
    `generator` draws the initial weights (default: torch's global state). Raises ValueError where
    `width` is not a multiple of 8.
    """

    def __init__(self, channels_in: int, width: int, dim: int, generator: Generator | None = None) -> None:
        super().__init__()
        if width % GROUPS:
            raise ValueError(f"width {width} must be a multiple of {GROUPS}")
        self.channels_in, self.width, self.dim = channels_in, width, dim
        self.stem = nn.Conv2d(channels_in, width, 3, padding=1)
        self.stages = nn.Sequential(
            Residual(width, width, stride=1),
            Residual(width, 2 * width, stride=2),
            Residual(2 * width, 4 * width, stride=2),
        )
        self.norm = nn.GroupNorm(GROUPS, 4 * width)
        self.head = nn.Linear(4 * width, dim)
        initialise(self, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, dim) of pixels (B, C, H, W) in [-1, 1]."""
        hidden = functional.silu(self.norm(self.stages(self.stem(x))))
        return self.head(hidden.mean(dim=(2, 3)))


def initialise(network: nn.Module, generator: Generator | None) -> None:
    """Draw the weights of all convolutions and linear layers (He et al. 2015, Eq. 10); biases are 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class Residual(nn.Module):
    """Pre-activation residual block (He et al. 2016, arXiv 1603.05027): width_in to width channels."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        same = stride == 1 and width_in == width
        self.skip = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride)."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(functional.silu(self.norm2(hidden)))
