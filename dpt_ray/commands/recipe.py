"""Settings for the user's own images: networks and training lengths by number, size and available time.

Rules of thumb: take the largest network that sees each image often enough in the available time, and see
no image more often than helps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpt_ray.config.sections import Denoiser
from dpt_ray.config.training import Pretrain
from dpt_ray.pipeline.speed import Rates

LARGEST_IN_PIXELS = 32  # side of an image; above it latents and published weights are needed
START = 60.0  # seconds of a run without networks: Ray's start, reading, fits
ENCODER, DENOISER, SAMPLES = 0.4, 0.4, 0.15  # shares of the time; features and metrics have the rest

DIM = 128  # length of the encoder's features
WIDTHS = (64, 48, 32, 24, 16)  # of the encoder
SHAPES = (
    (512, 12, 8),
    (384, 8, 6),
    (256, 6, 4),
    (192, 6, 3),
    (128, 4, 4),
)  # dim, depth, heads of the denoiser
# A network is too large if it cannot see this many epochs (and this many images); none sees more than the
# maximum.
ENCODER_EPOCHS, MOST_ENCODER_EPOCHS, ENCODED = 20, 100, 64_000
DENOISER_EPOCHS, MOST_DENOISER_EPOCHS, DENOISED = 40, 200, 256_000
FEWEST_STEPS, STEPS_BEFORE_BATCHES = 100, 1000
PER_CLASS = (128, 64, 32, 16)  # generated images; a unit has 16
NFE = 25
# A two-core processor; its networks are the ones with which any machine is measured first.
AVERAGE = Rates(conv=80e9, transformer=120e9, device="cpu")

# Of a learner that trains the encoder: unlabelled images for each labelled one, and passes over all of them.
LEARNER_RATIO, LEARNER_EPOCHS = 5, 100

# dim, depth, heads of the denoiser on latents, for fewer than MANY_IMAGES images and for more.
LATENT_SHAPES, MANY_IMAGES = ((384, 10, 6), (512, 12, 8)), 20_000
LATENT_EPOCHS, LEAST_LATENTS, MOST_LATENTS = 200, 2_560_000, 25_600_000


@dataclass(frozen=True)
class Images:
    """The images: `train` of `all` are for training; `side` is in pixels."""

    train: int
    all: int
    side: int
    channels: int
    classes: int

    @property
    def photographs(self) -> bool:
        """Whether they are taken for photographs: in colour, and not tiny."""
        return self.channels == 3 and self.side >= 16

    @property
    def network(self) -> str:
        """The encoder's network."""
        return "resnet" if self.photographs else "small_conv"


@dataclass(frozen=True)
class Training:
    """The length, batch size and learning rate of a training."""

    steps: int
    batch_size: int
    learning_rate: float

    @property
    def warmup_steps(self) -> int:
        """A twentieth of the steps, at most 5,000."""
        return min(5000, self.steps // 20)

    @property
    def ema_decay(self) -> float:
        """The EMA spans about a tenth of the steps, at most 10,000."""
        return max(0.9, min(0.9999, round(1 - 10 / self.steps, 4)))


@dataclass(frozen=True)
class Recipe:
    """The networks of a run on small images, their trainings and the number of generated images."""

    width: int
    denoiser: Denoiser
    encoding: Training
    denoising: Training
    images_per_class: int


def choose(images: Images, seconds: float, rates: Rates) -> Recipe:
    """Return the largest networks that can be trained in `seconds` at these rates, and their trainings."""
    widths = [width for width in WIDTHS if images.side >= 16 or width <= 32]
    least = max(ENCODED, ENCODER_EPOCHS * images.train)
    width = next((w for w in widths if _encoded(images, w, seconds, rates) >= least), widths[-1])
    denoisers = [_denoiser(images.side, *shape) for shape in SHAPES]
    least = max(DENOISED, DENOISER_EPOCHS * images.train)
    trained = (d for d in denoisers if _denoised(images, d, seconds, rates) >= least)
    return lengths(images, seconds, rates, width, next(trained, denoisers[-1]))


def lengths(images: Images, seconds: float, rates: Rates, width: int, denoiser: Denoiser) -> Recipe:
    """Return the recipe with these networks that takes at most `seconds`, if possible."""
    most = max(ENCODED, MOST_ENCODER_EPOCHS * images.train)
    encoded = min(most, _encoded(images, width, seconds, rates))
    most = max(DENOISED, MOST_DENOISER_EPOCHS * images.train)
    denoised = min(most, _denoised(images, denoiser, seconds, rates))
    sampled = SAMPLES * _left(seconds) * rates.transformer / (NFE * _denoiser_flops(images, denoiser))
    per_class = next((k for k in PER_CLASS if k * images.classes <= sampled), PER_CLASS[-1])
    return Recipe(
        width,
        denoiser,
        _training(encoded, images.train, 2e-3 if width > 32 or images.photographs else 4e-3),
        _training(denoised, images.train, 1e-3 if denoiser.dim <= 256 else 5e-4),
        per_class,
    )


@dataclass(frozen=True)
class LatentRecipe:
    """The denoiser of larger images, on latents of a published autoencoder, and its training."""

    denoiser: Denoiser
    denoising: Training


def latent_recipe(images: Images, seconds: float | None, rates: Rates) -> LatentRecipe:
    """Return the recipe for this number of images; the denoiser takes at most `seconds`, if given."""
    dim, depth, heads = LATENT_SHAPES[images.train >= MANY_IMAGES]
    denoiser = Denoiser(patch_size=2, dim=dim, depth=depth, heads=heads)
    latents = Images(images.train, images.all, images.side // 8, 4, images.classes)
    seen: float = min(MOST_LATENTS, max(LEAST_LATENTS, LATENT_EPOCHS * images.train))
    if seconds is not None:
        seen = min(seen, _denoised(latents, denoiser, seconds, rates))
    return LatentRecipe(denoiser, _training(seen, images.train, 2e-4))


def learner_training(images: Images, seconds: float | None, each: float) -> Training:
    """Return the training of a learner whose steps take `each` seconds, `seconds` in all, if given.

    Its learning rate is proportional to the batch, 1e-3 at 256 labelled images for a vision transformer
    (Semi-ViT's) and four times that for a small convolutional network.
    """
    batch = 32 if images.train >= 32 else 8
    steps = max(FEWEST_STEPS, LEARNER_EPOCHS * images.train // (batch * LEARNER_RATIO))
    if seconds is not None:
        steps = max(FEWEST_STEPS, min(steps, int(seconds / max(each, 1e-9))))
    tens = 10 ** (len(str(steps)) - 2)  # round to two digits
    base = 1e-3 if images.side > LARGEST_IN_PIXELS else 4e-3
    return Training(steps // tens * tens, batch, base * batch / 256)


def _training(seen: float, train: int, learning_rate: float) -> Training:
    batch = 64 if train >= 64 else 8
    while batch < 256 and 16 * batch <= train and seen >= 2 * batch * STEPS_BEFORE_BATCHES:
        batch *= 2
    steps = max(FEWEST_STEPS, int(seen / batch))
    tens = 10 ** (len(str(steps)) - 2)  # round to two digits
    return Training(steps // tens * tens, batch, learning_rate)


def _left(seconds: float) -> float:
    return max(0.0, seconds - START)


def _encoded(images: Images, width: int, seconds: float, rates: Rates) -> float:
    """Return how many images the encoder can train on (two views) besides extracting all features."""
    forward = _encoder_flops(images, width)
    return max(0.0, ENCODER * _left(seconds) * rates.conv / forward - images.all) / 6


def _denoised(images: Images, denoiser: Denoiser, seconds: float, rates: Rates) -> float:
    """Return how many images the denoiser can train on."""
    return DENOISER * _left(seconds) * rates.transformer / (3 * _denoiser_flops(images, denoiser))


def _encoder_flops(images: Images, width: int) -> float:
    import torch

    from dpt_ray.models.own_networks import own_network
    from dpt_ray.training.throughput import forward_flops

    section = Pretrain(
        network=images.network, width=width, dim=DIM, steps=1, batch_size=128, learning_rate=1.0
    )
    network, _ = own_network(section, images.channels, images.side)
    return forward_flops(network, torch.empty(1, images.channels, images.side, images.side))


def _denoiser_flops(images: Images, denoiser: Denoiser) -> float:
    from dpt_ray.models.uvit import UViTConfig, flops

    config = UViTConfig(images.side, in_channels=images.channels, num_classes=1, **denoiser.model_dump())
    return flops(config)


def _denoiser(side: int, dim: int, depth: int, heads: int) -> Denoiser:
    return Denoiser(patch_size=max(1, side // 8), dim=dim, depth=depth, heads=heads, modulation=True)
