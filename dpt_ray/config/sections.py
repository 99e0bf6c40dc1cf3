"""The sections of a run's configuration: typed, frozen, each checked by itself.

They mirror the stages. `compute` says how to run and never changes a result, so it is never part of an
artifact's identity. `guidance` is the diffusers convention w (1 = none; the paper's s = 0.4 is w = 1.4).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dpt_ray.config.hashing import Hashed, HashedFile, HashedIfSet, NotHashed, Section, Settings

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
# "auto": bfloat16 on a GPU or on a processor that is faster with it, else float32 (models/precision.py).
Precision = Literal["float32", "bfloat16", "auto"]
ResolvedPrecision = Literal["float32", "bfloat16"]
ListFormat = Literal["csv", "published"]
ScheduleName = Literal["vp", "stable_diffusion", "cosine", "linear"]
Prediction = Literal["noise", "v", "flow"]
Resize = Literal["tensorflow", "pytorch_fid", "clean"]
RealWeight = Annotated[float, Field(gt=0)] | Literal["balanced"]


class Data(Settings):
    """Where the images are. `validation` and `test` are drawn where the source has no such split.

    `splits` says what a folder's or shard's split name means here: ImageNet's 50,000 are `{val: test}`.
    `classes` names the classes of a source that does not say them (images without true labels).
    Images in the label lists `keep_in_train` (in the format of `labels.format`) are not drawn.
    """

    source: Literal["digits", "folder", "tar", "parquet", "manifest"]
    uri: Annotated[str | None, Hashed] = None
    mode: Literal["L", "RGB"] = "RGB"
    image_size: Count = 256
    validation: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0
    split_seed: Seed = 0
    classes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    splits: dict[str, Literal["train", "validation", "test"]] = Field(default_factory=dict)
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
    """The few labels: drawn (`per_class` of the known ones, by `seed`) or listed in a `file`."""

    per_class: Annotated[Count | None, Hashed] = None
    seed: Seed = 0
    file: Annotated[str | None, HashedFile(key="labels.file")] = None
    format: ListFormat = "csv"

    @model_validator(mode="after")
    def _one_source(self) -> Labels:
        if (self.per_class is None) == (self.file is None):
            raise ValueError("give either per_class (draw) or file (a label list)")
        return self


class Optimisation(Settings):
    """AdamW with warm-up, shared by every training stage. `batch_size` is the global batch.

    A checkpoint is made every `checkpoint_every` steps, or about every `checkpoint_seconds` where that is
    sooner; those by time are made less often where they would take more than a twentieth of it.

    A training whose loss stays above `diverged_above` times the lowest it was, and above its first, is
    rolled back once and then stopped.
    """

    steps: Count
    batch_size: Annotated[int, Field(ge=8, multiple_of=8)]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.03
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.99)
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    ema_decay: Fraction = 0.999
    grad_clip: Annotated[Positive | None, Hashed] = None
    precision: Precision = "float32"
    checkpoint_every: Annotated[Count, NotHashed] = 200
    checkpoint_seconds: Annotated[Positive, NotHashed] = 120.0
    log_every: Annotated[Count, NotHashed] = 20
    diverged_above: Annotated[float, Field(gt=1), NotHashed] = 5.0
    seed: Seed = 0


class Pretrain(Optimisation):
    """Self-supervised encoder on the run's own images (SimCLR), for those who bring none."""

    width: Count = 32
    dim: Count = 128
    temperature: Positive = 0.2
    contrast_group: Count = 128
    augment_strength: Positive = 1.0

    @model_validator(mode="after")
    def _groups(self) -> Pretrain:
        if self.batch_size % self.contrast_group or self.contrast_group % 8:
            raise ValueError(
                f"contrast_group {self.contrast_group} must divide batch_size {self.batch_size} "
                "and be a multiple of 8"
            )
        return self


class Encoder(Settings):
    """The frozen encoder: trained here (`pretrain`) or loaded from published weights.

    A timm model without `weights` has those that timm publishes under its `name` on the Hugging Face hub.
    Of an MSN file `heads` (of attention) are width / 64 unless set, and the feature is the CLS tokens of
    the last `blocks` (1) blocks.
    """

    kind: Literal["pretrain", "msn", "timm"] = "pretrain"
    name: Annotated[str | None, Hashed] = None
    weights: Annotated[str | None, HashedFile(key="encoder.weights")] = None
    heads: Annotated[Count | None, HashedIfSet] = None
    blocks: Annotated[Count | None, HashedIfSet] = None
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _weights(self) -> Encoder:
        if self.kind == "msn" and not self.weights:
            raise ValueError("kind msn needs weights: the path or URI of the published file")
        if self.kind == "timm" and not self.name:
            raise ValueError("kind timm needs name: the model's, such as vit_base_patch16_224.mae")
        if self.kind != "msn" and (self.heads or self.blocks):
            raise ValueError(f"heads and blocks are of kind msn, not {self.kind}: leave them out")
        return self


class Autoencoder(Settings):
    """Images to moments and latents back to images; `identity` trains on the pixels themselves.

    `weights` is a file with LDM's names or a folder in diffusers' format, also on the Hugging Face hub:
    `hf://stabilityai/sd-vae-ft-ema`. `precision` is that of the encoder and, where `generate.precision` is
    left out, of both networks that make images (while the denoiser is trained, `diffusion.precision` is).
    """

    kind: Literal["identity", "kl"] = "identity"
    weights: Annotated[str | None, HashedFile(key="autoencoder.weights")] = None
    flips: bool = True
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _weights(self) -> Autoencoder:
        if self.kind == "kl" and not self.weights:
            raise ValueError("kind kl needs weights: the path or URI of the published file or folder")
        return self


class Classifier(Settings):
    """Multinomial logistic regression on row-normalised features: l2 = 0.0025 / n in the paper."""

    l2: Positive = 0.0025
    max_iterations: Annotated[Count | None, Hashed] = None


class Denoiser(Settings):
    """The U-ViT. `modulation` (adaLN) off is the published network."""

    patch_size: Count = 2
    dim: Count
    depth: Annotated[int, Field(ge=2, multiple_of=2)]
    heads: Count
    final_conv: bool = True
    modulation: bool = False

    @model_validator(mode="after")
    def _heads(self) -> Denoiser:
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} must divide dim {self.dim}")
        return self


class Diffusion(Optimisation):
    """Stage 2: what the denoiser is, and how it is trained.

    With `weights` (a published U-ViT's `nnet_ema.pth`) it is taken as it is instead, and the training
    settings are not used; it knows the classes it was trained on, whatever the labels here.
    `init_from`: weights to start from, a published checkpoint or a denoiser of this project, also of
    another number of classes. `min_snr_gamma`: weights of the loss (arXiv 2303.09556). `min_confidence`:
    pseudo-labels below it train the null class only. `alignment`: the weight lambda of the alignment of
    the middle block with the images' stage-1 features (REPA, arXiv 2410.06940, pooled; 0.5 there).
    `preview_every`: steps between pictures. `frechet_every`: steps between small Frechet distances, in
    the features of the run's encoder and with its guidance.
    `shuffle_shards`: for moments that do not fit on a node's disk: rows are shuffled within windows of so
    many of their shards (256 rows each), of which a node holds two, and not across all.
    """

    model: Denoiser
    schedule: ScheduleName = "vp"
    prediction: Prediction = "noise"
    label_dropout: Fraction = 0.15
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


class Sampling(Settings):
    """How images are sampled from a denoiser."""

    guidance: Positive = 1.0
    guidance_interval: Annotated[Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None, Hashed] = (
        None
    )
    solver: Literal["dpm_solver_fast", "dpm_solver_pp_fast", "dpm_solver_pp_2m"] = "dpm_solver_pp_2m"
    nfe: Count = 25
    indices_per_shard: Count = 16
    seed: Seed = 0

    @model_validator(mode="after")
    def _interval(self) -> Sampling:
        if self.guidance_interval and not self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} is empty: give low < high")
        return self


class SampleSettings(Sampling):
    """How images are sampled and decoded; `precision` is that of both networks."""

    precision: ResolvedPrecision


class Generate(Sampling):
    """Class-conditional sampling. `images_per_class` may grow later without making any image again.

    `precision` of denoiser and decoder is `autoencoder.precision` where it is left out.
    """

    images_per_class: Count
    precision: Annotated[Precision | None, HashedIfSet] = None


class Retrain(Settings):
    """Stage 3: real labelled rows (weight `real_weight`) with generated rows (weight 1)."""

    images_per_class: Count
    real_weight: RealWeight = 1.0
    l2: Positive = 0.0025
    max_iterations: Annotated[Count | None, Hashed] = None


class Sweep(Settings):
    """The grid of stage 3 (and of its controls), chosen on validation."""

    images_per_class: Counts
    real_weight: Annotated[tuple[RealWeight, ...], Field(strict=False, min_length=1)] = (1.0,)
    l2: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (0.0025,)


class Evaluate(Section):
    """What is measured. `referee` is an independent classifier, trained only to measure.

    `controls` are what DPT is held against: the sweep on augmented labelled and on pseudo-labelled images,
    and the probe with its l2 chosen as theirs, from `classifier.l2` and three decades below it.
    `inception` (the file of FID's Inception weights) has FID, sFID, Inception Score, KID, precision and
    recall measured, of all generated images or of `images` of them: the first of each class ("balanced"
    `labels`), or as many as "uniform" random labels ask for, as U-ViT and DPT draw them. `reference`
    is an npz of `mu` and `sigma` (for sFID ADM's `mu_s` and `sigma_s`) for FID, in place of the run's own
    test images. `resize` to Inception's 299 pixels: "tensorflow" is that of ADM's evaluator and its
    statistics, "pytorch_fid" that of U-ViT's and DPT's numbers, "clean" is clean-fid.
    """

    controls: bool = True
    augment_strength: Positive = 1.0
    referee: Pretrain | None = None
    inception: str | None = None
    reference: str | None = None
    resize: Resize = "tensorflow"
    images: Count | None = None
    labels: Literal["balanced", "uniform"] = "balanced"

    @model_validator(mode="after")
    def _drawn(self) -> Evaluate:
        if self.labels == "uniform" and not self.images:
            raise ValueError("labels uniform needs images: how many of the generated images are drawn")
        return self


class Compute(Section):
    """How to run: recorded, never part of an identity.

    `train_workers: 0` trains in the driver's process, without Ray Train's worker processes (their
    start-up costs more than a small training). With `min_train_workers` the training is elastic: it runs
    with as many workers from that to `train_workers` as there is room for, looked at every
    `resize_seconds`. `max_failures` counts those in a row without a new checkpoint. `threads` are per
    worker and actor; by default each has its share of the CPUs of the machine or cluster, or of `cpus`.
    Another number of threads changes the rounding of floats and nothing else: set it where results must
    be the same to the bit on another machine. `readers` are tasks that decode at a time (by default one
    for each actor, four where it has a GPU).
    `gradient_accumulation` (parts that a worker's batch is computed in) and `gradient_checkpointing` (a
    third more work) save the memory of the denoiser's training. `compile` is torch.compile for every
    network that is trained, that computes features or moments, or that samples: worth it on a GPU.
    `fsdp`: two or more training workers share one copy of weights, averages and moments (FSDP2) where
    otherwise each has its own (DDP), for models that need it.
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

    @model_validator(mode="after")
    def _elastic(self) -> Compute:
        if self.min_train_workers and self.min_train_workers > self.train_workers:
            raise ValueError(
                f"min_train_workers {self.min_train_workers} is more than train_workers "
                f"{self.train_workers}: set train_workers to the most that there may be"
            )
        return self
