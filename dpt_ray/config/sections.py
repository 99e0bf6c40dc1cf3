"""The sections of a run's configuration: typed, frozen, each validated on its own.

They mirror the stages. `compute` sets how a run executes and never changes a result, so it is not part of
any identity. `guidance` is the diffusers convention w (1 = none; the paper's s = 0.4 is w = 1.4).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpt_ray.config.hashing import Hashed, HashedFile, HashedIfSet, NotHashed, Section, Settings
from dpt_ray.config.semi_supervised import LearnerName
from dpt_ray.config.training import Optimisation
from dpt_ray.config.values import (
    BelowOne,
    Count,
    Fraction,
    Positive,
    Precision,
    ResolvedPrecision,
    Seed,
    Splits,
)

ListFormat = Literal["csv", "published"]
ScheduleName = Literal["vp", "stable_diffusion", "cosine", "linear"]
Prediction = Literal["noise", "v", "flow"]
Resize = Literal["tensorflow", "pytorch_fid", "clean"]
LabelChoice = Literal["balanced", "uniform"]
Solver = Literal["dpm_solver_fast", "dpm_solver_pp_fast", "dpm_solver_pp_2m"]
RealWeight = Annotated[float, Field(gt=0)] | Literal["balanced"]


class Data(Settings):
    """Where the images are and how they are split.

    `validation` and `test` are the numbers of training images drawn for a split that the source lacks.
    `splits` maps the source's split names to those used here: `{val: test}` for ImageNet's 50,000.
    `classes` lists the class names of a source without true labels.
    `keep_in_train` names label lists (in `labels.format`) whose images are never drawn.
    """

    source: Literal["digits", "folder", "tar", "parquet", "manifest"]
    uri: Annotated[str | None, Hashed] = None
    mode: Literal["L", "RGB"] = "RGB"
    image_size: Count = 256
    validation: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0
    split_seed: Seed = 0
    classes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    splits: Splits = Field(default_factory=dict)
    keep_in_train: Annotated[tuple[str, ...], Field(strict=False), NotHashed] = ()
    max_bad_fraction: Annotated[Fraction, NotHashed] = 0.001

    @model_validator(mode="after")
    def _uri(self) -> Data:
        if self.source == "digits" and (self.uri or self.validation or self.test):
            raise ValueError("digits comes with scikit-learn: leave out uri, validation and test")
        if self.source == "digits" and (self.splits or self.classes or self.keep_in_train):
            raise ValueError("digits has its own: leave out splits, classes and keep_in_train")
        if self.source != "digits" and not self.uri:
            raise ValueError(f"source {self.source} needs uri: the folder or file of the images")
        return self


class Labels(Settings):
    """The few labels: `per_class` of the true labels, drawn with `seed`, or a label list `file`."""

    per_class: Annotated[Count | None, Hashed] = None
    seed: Seed = 0
    file: Annotated[str | None, HashedFile(key="labels.file")] = None
    format: ListFormat = "csv"

    @model_validator(mode="after")
    def _one_source(self) -> Labels:
        if self.per_class is not None and self.file is not None:
            raise ValueError(
                f"per_class {self.per_class} draws labels and file {self.file!r} lists them: leave one out, "
                "labels.per_class=null or labels.file=null"
            )
        if self.per_class is None and self.file is None:
            raise ValueError("give either per_class (draw) or file (a label list)")
        if self.file is not None and self.seed:
            raise ValueError(
                f"seed {self.seed} draws labels and file {self.file!r} lists them: leave seed out"
            )
        return self


class Encoder(Settings):
    """The frozen encoder: trained by the run (`pretrain`) or loaded from published weights.

    For kind `timm`, `weights` defaults to those that timm publishes for `name` on the Hugging Face hub.
    With `image_size` images are resized to this side instead of the crop that timm states, and of a square
    image no border is cut: 112 for images of 32 pixels.
    For kind `msn`, `heads` (attention heads) defaults to width / 64, and the feature is the concatenated
    CLS tokens of the last `blocks` (default 1) blocks.
    """

    kind: Literal["pretrain", "msn", "timm"] = "pretrain"
    name: Annotated[str | None, Hashed] = None
    weights: Annotated[str | None, HashedFile(key="encoder.weights")] = None
    heads: Annotated[Count | None, HashedIfSet] = None
    blocks: Annotated[Count | None, HashedIfSet] = None
    image_size: Annotated[Count | None, HashedIfSet] = None
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _weights(self) -> Encoder:
        if self.kind != "timm" and self.image_size:
            raise ValueError(f"image_size is of kind timm, not {self.kind}: leave it out")
        if self.kind == "pretrain" and (self.name or self.weights):
            raise ValueError(
                "name and weights are of kinds timm and msn, not pretrain: set kind, or leave both out"
            )
        if self.kind == "msn" and not self.weights:
            raise ValueError("kind msn needs weights: the path or URI of the published file")
        if self.kind == "timm" and not self.name:
            raise ValueError("kind timm needs name: the model's, such as vit_base_patch16_224.mae")
        if self.kind != "msn" and (self.heads or self.blocks):
            raise ValueError(f"heads and blocks are of kind msn, not {self.kind}: leave them out")
        return self


class Autoencoder(Settings):
    """The autoencoder: images to moments, latents to images. `identity` trains on pixels.

    `weights` is a file with LDM's parameter names or a folder in the diffusers format, which may be on the
    Hugging Face hub: `hf://stabilityai/sd-vae-ft-ema`.
    `precision` is used to compute moments and is the default of `generate.precision`, which images sampled
    during the denoiser's training have as well.
    """

    kind: Literal["identity", "kl"] = "identity"
    weights: Annotated[str | None, HashedFile(key="autoencoder.weights")] = None
    flips: bool = True
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _weights(self) -> Autoencoder:
        if self.kind == "identity" and self.weights:
            raise ValueError("weights are of kind kl, not identity: set kind kl, or leave them out")
        if self.kind == "kl" and not self.weights:
            raise ValueError("kind kl needs weights: the path or URI of the published file or folder")
        return self


class Classifier(Settings):
    """Multinomial logistic regression on row-normalised features, and which learner stage 1 has besides.

    The penalty's weight is lambda = `l2` / n for n rows; the paper's `l2` is 0.0025. A `learner` other than
    "linear" trains the encoder on pixels as `semi_supervised` says; the regression stays its baseline.
    """

    learner: Annotated[LearnerName, NotHashed] = "linear"
    l2: Positive = 0.0025
    max_iterations: Annotated[Count | None, Hashed] = None


class Denoiser(Settings):
    """The U-ViT's architecture. The published networks have no `modulation` (adaLN)."""

    patch_size: Count = 2
    dim: Count
    depth: Annotated[int, Field(ge=2, multiple_of=2)]
    heads: Count
    final_conv: bool = True
    modulation: bool = False

    @model_validator(mode="after")
    def _heads(self) -> Denoiser:
        if self.dim % 2:  # half of a time embedding are sines, half cosines
            raise ValueError(f"dim {self.dim} must be even")
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} must divide dim {self.dim}")
        return self


class Diffusion(Optimisation):
    """Stage 2: the denoiser and its training.

    - `weights`: a published U-ViT (`nnet_ema.pth`) to use without training; the training settings are then
      ignored, and the classes are those it was trained on.
    - `init_from`: initial weights, a published checkpoint or a denoiser of this project; the number of
      classes may differ.
    - `min_snr_gamma`: gamma of the min-SNR loss weights (arXiv 2303.09556).
    - `min_confidence`: images whose pseudo-label has a lower confidence train the null class only.
    - `alignment`: weight lambda of the loss that aligns the middle block with the images' stage-1 features
      (REPA, arXiv 2410.06940, pooled; the paper uses 0.5).
    - `preview_every`: steps between previews, small grids of sampled images.
    - `frechet_every`: steps between Frechet distances of a small sample, in the features of the run's
      encoder and with the guidance of `generate`.
    - `shuffle_shards`: for moments larger than a node's disk: shuffle rows within windows of this many
      shards (256 rows each) rather than across all of them; a node holds two windows.
    """

    model: Denoiser
    schedule: ScheduleName = "vp"
    prediction: Prediction = "noise"
    label_dropout: BelowOne = 0.15
    condition: Literal["pseudo_labels", "true_labels", "none"] = "pseudo_labels"
    weights: Annotated[str | None, HashedFile(key="diffusion.weights")] = None
    init_from: Annotated[str | None, HashedFile(key="diffusion.init_from")] = None
    min_snr_gamma: Annotated[Positive | None, HashedIfSet] = None
    min_confidence: Annotated[Fraction | None, HashedIfSet] = None
    alignment: Annotated[Positive | None, HashedIfSet] = None
    preview_every: Annotated[Count | None, NotHashed] = None
    frechet_every: Annotated[Count | None, NotHashed] = None
    shuffle_shards: Annotated[Count | None, HashedIfSet] = None

    @model_validator(mode="after")
    def _together(self) -> Diffusion:
        if self.weights and self.condition == "pseudo_labels":
            raise ValueError(
                "weights are of a network trained on true labels or none: set condition true_labels or none"
            )
        if self.weights and self.init_from:
            raise ValueError("give weights (used as they are) or init_from (trained on), not both")
        if self.min_confidence is not None and self.condition != "pseudo_labels":
            raise ValueError(f"min_confidence needs condition pseudo_labels, not {self.condition}")
        if self.weights and self.alignment:
            raise ValueError("alignment is for training, and weights are used as they are: leave one out")
        if self.frechet_every and self.frechet_every % self.log_every:
            raise ValueError(
                f"frechet_every {self.frechet_every} must be a multiple of log_every {self.log_every}, "
                "whose records it goes into"
            )
        return self


class Resample(Settings):
    """Sample an image again, from other noise, until a classifier takes it for its class.

    The classifier is that of `labels_from` (the probe, where that one has features of its own). It has to
    give the image its own class, with a confidence of `min_confidence` or more; 0 is agreement alone. After
    `attempts` images the one that is surest to be of the class is taken: `retrain.min_confidence` leaves
    those out of stage 3. An image depends on its own attempts only, so more images per class change none.
    """

    min_confidence: Fraction
    attempts: Annotated[int, Field(ge=2)] = 8


class Sampling(Settings):
    """Settings of the sampler that draws images from a denoiser."""

    guidance: Positive = 1.0
    guidance_interval: Annotated[Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None, Hashed] = (
        None
    )
    solver: Solver = "dpm_solver_pp_2m"
    nfe: Count = 25
    indices_per_shard: Count = 16
    seed: Seed = 0
    resample: Annotated[Resample | None, HashedIfSet] = None

    @model_validator(mode="after")
    def _interval(self) -> Sampling:
        if self.guidance_interval and not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} is empty: give low < high")
        return self


class SampleSettings(Sampling):
    """Settings of sampling and decoding; `precision` applies to both networks.

    `features_precision` is the encoder's, with which images are judged for `resample`.
    """

    precision: ResolvedPrecision
    features_precision: Annotated[ResolvedPrecision | None, HashedIfSet] = None


class Generate(Sampling):
    """Class-conditional sampling. Raising `images_per_class` later adds images and repeats none.

    `precision` applies to denoiser and decoder; its default is `autoencoder.precision`.
    """

    images_per_class: Count
    precision: Annotated[Precision | None, HashedIfSet] = None


class Retrain(Settings):
    """Stage 3: the classifier of labelled rows (weight `real_weight`) and generated rows (weight 1).

    With `min_confidence` only those generated images are used whose class the classifier of `labels_from`
    agrees with (the probe, where that one has features of its own), with at least this confidence: 0 is
    agreement alone. The next images of the class take the place of the others, to the end of the last shard
    of `generate.images_per_class`.
    """

    images_per_class: Count
    real_weight: RealWeight = 1.0
    l2: Positive = 0.0025
    max_iterations: Annotated[Count | None, Hashed] = None
    min_confidence: Annotated[Fraction | None, HashedIfSet] = None


class Compute(Section):
    """How a run executes: recorded in manifests, never part of an identity.

    - `cpus`: CPUs that a run uses of the machine where it starts Ray itself (default: all).
    - `threads`: threads of each worker and actor (default: an equal share of the cluster's CPUs). Their
      number affects only the rounding of floats; set it for bit-identical results on another machine.
    - `train_workers`: training processes. 0 trains in the driver, without Ray Train, whose start-up takes
      longer than a small training.
    - `min_train_workers`: makes trainings elastic: they use between this and `train_workers` workers, as
      many as fit; Ray checks for room every `resize_seconds`.
    - `max_failures`: failures in a row, without a new checkpoint in between, that a training survives.
    - `actors`: maximum number of actors that run models over images, of `actor_cpus` and `actor_gpus`
      each; `batch_size` is that of their forward passes. With `actor_gpus` a fit of classifiers runs as a
      task with these resources, not in the driver, and a sweep's trials have them too.
    - `readers`: maximum number of concurrent tasks that decode images (default: one for each actor, four
      for each actor with a GPU).
    - `gradient_accumulation` (number of parts of a worker's batch) and `gradient_checkpointing` (a third
      more computation) reduce the memory of the denoiser's training.
    - `compile`: apply torch.compile to every network that is trained, that computes features or moments, or
      that samples; worth it on a GPU.
    - `fsdp`: shard the denoiser's weights, their averages and the optimizer's moments across training workers
      (FSDP2) rather than replicate them (DDP), where it does not fit otherwise. Other trainings replicate.
    - `concurrent_trials`: maximum number of a sweep's trials that run at a time.
    - `autoscaling`: the cluster adds nodes on demand, so do not require that the work fits at the start.
    - `max_gpu_hours`: the most GPU hours that this run may spend, over all its attempts. It then stops, a
      training at a checkpoint, and continues once this is raised. What stages ask for counts (GPUs of
      actors, training workers, fits and trials x seconds, with start-up and the wait for nodes), not nodes
      that idle.
    """

    cpus: Count | None = None
    threads: Count | None = None
    train_workers: Annotated[int, Field(ge=0)] = 1
    min_train_workers: Count | None = None
    resize_seconds: Positive = 60.0
    actors: Count = 1
    readers: Count | None = None
    actor_cpus: Positive = 0.5
    actor_gpus: Annotated[float, Field(ge=0)] = 0.0
    train_gpus: bool = False
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    batch_size: Count = 256
    max_failures: Annotated[int, Field(ge=0)] = 2
    concurrent_trials: Count = 2
    autoscaling: bool = False
    max_gpu_hours: Positive | None = None

    @model_validator(mode="after")
    def _spending(self) -> Compute:
        if self.max_gpu_hours and not (self.actor_gpus or self.train_gpus):
            raise ValueError(
                f"max_gpu_hours {self.max_gpu_hours:g} limits nothing without GPUs: set actor_gpus or "
                "train_gpus, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _elastic(self) -> Compute:
        if self.actor_gpus > 1 and self.actor_gpus % 1:
            raise ValueError(f"actor_gpus {self.actor_gpus}: give a whole number, or a part of one GPU")
        if self.min_train_workers and self.min_train_workers > self.train_workers:
            raise ValueError(
                f"min_train_workers {self.min_train_workers} is more than train_workers "
                f"{self.train_workers}: set train_workers to the most that there may be"
            )
        return self
