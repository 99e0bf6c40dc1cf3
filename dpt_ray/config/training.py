"""The settings of a training, and of an encoder that is trained on the run's own images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpt_ray.config.hashing import Hashed, HashedIfSet, NotHashed, Settings
from dpt_ray.config.values import Augmentation, BelowOne, Count, Positive, Precision, Seed

CONVOLUTIONAL = ("small_conv", "resnet")  # this project's networks of encoders; others are timm's


class Optimisation(Settings):
    """AdamW with warm-up, shared by every training stage. `batch_size` is the global batch size.

    A checkpoint is saved every `checkpoint_every` steps or about every `checkpoint_seconds`, whichever
    comes first. Time-based checkpoints become less frequent if saving them would take more than 5% of the
    time.

    If ten logged losses in a row are above both the first one and `diverged_above` times the lowest mean of
    ten, the training returns to its last checkpoint once, and stops the second time.
    """

    steps: Count
    batch_size: Annotated[int, Field(ge=8, multiple_of=8)]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.03
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.99)
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    ema_decay: BelowOne = 0.999
    grad_clip: Annotated[Positive | None, Hashed] = None
    precision: Precision = "float32"
    checkpoint_every: Annotated[Count, NotHashed] = 200
    checkpoint_seconds: Annotated[Positive, NotHashed] = 120.0
    log_every: Annotated[Count, NotHashed] = 20
    diverged_above: Annotated[float, Field(gt=1), NotHashed] = 5.0
    seed: Seed = 0


class NetworkTraining(Optimisation):
    """Training of a new network on the run's own images.

    - `network`: small_conv, resnet (ResNet-18 for small images), or the name of a vision transformer of timm.
    - `patch_size`: of the vision transformer, in pixels.
    - `width`: channels of the first stage of small_conv and resnet.
    - `dim`: the length of small_conv's features.
    """

    network: Annotated[str, HashedIfSet] = "small_conv"
    patch_size: Annotated[Count | None, HashedIfSet] = None
    width: Count = 32
    dim: Count = 128

    @model_validator(mode="after")
    def _patches(self) -> NetworkTraining:
        if (self.network in CONVOLUTIONAL) == (self.patch_size is not None):
            raise ValueError(
                f"network {self.network} with patch_size {self.patch_size}: set patch_size for a vision "
                f"transformer of timm, and leave it out for {' and '.join(CONVOLUTIONAL)}"
            )
        if self.network in CONVOLUTIONAL and self.width % 8:
            raise ValueError(f"width {self.width} must be a multiple of 8")
        return self


class Pretrain(NetworkTraining):
    """Training of an encoder on the run's own images.

    - `dim`: also the length of the projections of resnet and of vision transformers.
    - `augmentation`: how the two views of an image differ. "digits" moves and recolours a little, without
      mirroring; "photographs" is SimCLR's: random crops, mirroring, strong changes of colour.
    - `augment_strength`: scales the changes ("photographs": of colour only).
    - `temperature`: of SimCLR's loss.
    - `contrast_group`: how many images of a batch the loss compares with each other.
    - `prototypes`: of MSN.
    """

    temperature: Positive = 0.2
    contrast_group: Count = 128
    augmentation: Annotated[Augmentation, HashedIfSet] = "digits"
    augment_strength: Positive = 1.0
    prototypes: Annotated[Count, HashedIfSet] = 512

    @model_validator(mode="after")
    def _groups(self) -> Pretrain:
        if self.batch_size % self.contrast_group or self.contrast_group % 8:
            raise ValueError(
                f"contrast_group {self.contrast_group} must divide batch_size {self.batch_size} "
                "and be a multiple of 8"
            )
        return self


class SelfSupervised(Pretrain):
    """Training of the encoder without labels, used where none is imported.

    - `objective`: "simclr", or "msn" (masked siamese networks), which masks patches for a vision transformer
      only; other networks learn from its crops.
    """

    objective: Literal["simclr", "msn"] = "simclr"
