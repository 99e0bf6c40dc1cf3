"""The records in published JSON files: what one stage hands to another.

They are plain JSON objects on disk and plain rows in Ray Data; their keys are checked by the type checker.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict


class Shard(TypedDict):
    """A published part of an artifact; `file` is the payload, relative to the artifact's folder."""

    shard: str
    file: str
    rows: int
    bytes: int
    sha256: str
    # Of features and moments: (id, reason) of unreadable images, and the shape of a row.
    bad: NotRequired[list[list[str]]]
    shape: NotRequired[list[int]]
    # Of Inception statistics: how many images could not be read.
    unreadable: NotRequired[int]


class TrialShard(Shard):
    """A trial of the sweep: its settings and validation results, with its classifier as payload."""

    method: str
    images_per_class: int | None
    real_weight: float | str
    l2: float
    min_confidence: NotRequired[float]
    samples: NotRequired[str]
    seed: NotRequired[int]
    validation_top1: float | None
    validation_nll: float | None
    objective: float
    iterations: int
    labelled: int


class IndexUnit(TypedDict):
    """A row group of a file of the index: images of one split. The first file is not named."""

    shard: str
    split: str
    row_group: int
    rows: int
    part: NotRequired[str]


class CropFields(TypedDict):
    """The fields of a `Crop`."""

    kind: Literal["none", "eval", "squash", "adm"]
    size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]


class Calibration(TypedDict):
    """The temperature fitted on `n` validation images; the other keys exist where n > 0.

    A bin is (mean confidence, accuracy, number of images).
    """

    temperature: float
    n: int
    ece_before: NotRequired[float]
    ece_after: NotRequired[float]
    bins_before: NotRequired[list[tuple[float, float, int]]]
    bins_after: NotRequired[list[tuple[float, float, int]]]


class RungFacts(TypedDict):
    """How a rung of the ladder was chosen: its setting, and its accuracy on what it was chosen on.

    `chosen_on` is validation images, cross-validation over the few labels, or none, with which the default
    setting was taken and there is no accuracy. `setting` is l2 of the tuned probe, else lambda x classes.
    """

    method: str
    setting: float
    chosen_on: Literal["validation", "cross-validation", "none"]
    top1: float | None
    stderr: float | None
    n: int


class LossState(TypedDict):
    """The losses that `guards.Divergence` compares with."""

    first: float
    lowest: float
    recent: list[float]
    high: int


class CheckpointMeta(TypedDict):
    """The JSON beside the tensors of a checkpoint; older ones have no `losses`."""

    step: int
    skipped_steps: int
    bad_in_a_row: int
    losses: NotRequired[LossState]


class Facts(TypedDict, total=False):
    """What a stage reports about its artifact; each stage fills some of the keys."""

    rows: int
    bytes: int
    shards: list[Shard]
    startup_seconds: float
    peak_memory_bytes: int
    reader_peak_memory_bytes: int
    # index
    units: list[IndexUnit]
    classes: int
    mode: Literal["L", "RGB"]
    # models
    crop: CropFields
    latent_shape: list[int]
    scale: float
    parameters: int
    # trainings
    loss: float | None
    threads: int
    null_labels: int
    matmul_flops_per_s: float
    continued_from: str
    continued_at_step: int
    not_continued: str
    # features, moments and Inception statistics
    shape: list[int]
    quarantined: int
    unreadable: int
    # samples: how many shards were made this time; with `resample` also how many images were sampled for
    # those that were taken, and how many of these pass
    made: int
    sampled: int
    passed: int
    # classifiers
    labelled: int
    unreadable_labels: int
    objective: float
    iterations: int
    n_validation: int
    validation_top1: float | None
    # rungs of the ladder: also the cross-entropy on validation
    validation_nll: float | None
    rung: RungFacts
    best: str
    # pseudo-labels
    calibration: Calibration
    # sweep: all trials, and the best on validation for each method
    trials: list[TrialShard]
    chosen: dict[str, TrialShard]
    # probe, image metrics and evaluation: the content of their JSON file
    result: dict[str, Any]


class Manifest(Facts, total=False):
    """The file that publishes an artifact: its identity, its inputs, and the facts of its stage.

    `settings` are the hashed settings, `unhashed` the others; only the engine reads them. `inputs` maps
    the hashed name of each input to its STAGE/IDENTITY.
    """

    stage: str
    name: str
    identity: str
    version: int
    settings: dict[str, Any]
    unhashed: dict[str, Any]
    inputs: dict[str, str]
    compute: dict[str, Any]
    started: str
    seconds: float
    code: str
    host: str
    driver_peak_memory_bytes: int
    gpu_hours: float  # of all attempts of the run that made it; absent without a GPU
