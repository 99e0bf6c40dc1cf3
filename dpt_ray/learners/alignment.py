"""Representation alignment of the denoiser (REPA, Yu et al. 2024, arXiv 2410.06940), pooled.

REPA aligns each patch token of a middle layer, through a small projection, with a frozen encoder's
token of the clean image (Eq. 8: minus the mean cosine similarity, weighted by lambda = 0.5). Stage 1
stores one feature per image and no patch tokens, so here the mean over the patch tokens is aligned
with that feature: it says what is in the image, not where.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dpt_ray.models.uvit import UViT

_DENOISER = "denoiser."


class AlignedDenoiser(nn.Module):
    """A denoiser with a projection of its middle block, which is used in training only."""

    def __init__(self, denoiser: UViT, feature_dim: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        dim = denoiser.config.dim
        # Three layers with SiLU, as in REPA, twice as wide as the network (there 2048 for 1152).
        self.projection = nn.Sequential(
            nn.Linear(dim, 2 * dim),
            nn.SiLU(),
            nn.Linear(2 * dim, 2 * dim),
            nn.SiLU(),
            nn.Linear(2 * dim, feature_dim),
        )

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction, like x, and the projection (B, feature_dim) of the middle block."""
        output, tokens = self.denoiser.with_middle(x, time, labels)
        return output, self.projection(tokens.mean(dim=1))


def alignment_loss(projection: Tensor, features: Tensor) -> Tensor:
    """Return 1 - the cosine similarity of each row of (B, feature_dim), in float32, (B,)."""
    return 1 - nn.functional.cosine_similarity(projection.float(), features.float(), dim=1)


def denoiser_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the denoiser's weights, under its own names, from those of an `AlignedDenoiser`."""
    return {
        name.removeprefix(_DENOISER): value for name, value in weights.items() if name.startswith(_DENOISER)
    }
