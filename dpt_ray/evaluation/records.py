"""What `probe.json`, `image_metrics.json` and `evaluation.json` hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

PROBE_FILE = "probe.json"
LADDER_FILE = "ladder.json"
METRICS_FILE = "image_metrics.json"
EVALUATION_FILE = "evaluation.json"
# What the Frechet distances in a training's log are distances of.
TRAINING_FRECHET_FILE = "frechet.json"


class AccuracyRow(TypedDict):
    """The accuracy of one method's classifier, each on so many images; None without images.

    `method` is a key of `methods.METHODS`. Older results have a displayed `name`, those of 2026-11-22 and
    before nothing else: read both with `methods.method_key`.
    """

    method: NotRequired[str]
    name: NotRequired[str]
    note: str
    validation: float | None
    n_validation: int
    test: float | None
    test_top5: float | None
    n_test: int


class Gain(TypedDict):
    """The paired gain of method `improved` over method `baseline` and its standard error.

    Both are keys of `methods.METHODS`, in older results displayed names: read them with `methods.key_of`.
    """

    baseline: str
    improved: str
    gain: float
    stderr: float
    kind: str


class ClassQuality(TypedDict):
    """Precision and recall of the pseudo-label of a class, given to `count` images."""

    name: str
    precision: float | None
    recall: float | None
    count: int


class PseudoLabelQuality(TypedDict):
    """How the pseudo-labels of the `n` training images with known labels agree with these."""

    accuracy: float
    n: int
    classes: list[ClassQuality]


class MetricRow(TypedDict):
    """One metric of the images `name`, with what a comparison needs: N, extractor, reference, resize.

    `spread` is the standard deviation over the subsets or splits that `metric` names. `n_reference` is
    None for a reference file without its count and for a metric without a reference.
    """

    metric: str
    name: str
    value: float
    spread: float | None
    n_generated: int
    n_reference: int | None
    extractor: str
    reference: str
    resize: str


class MetricsResult(TypedDict):
    """The measures of generated images, and why others are left out."""

    rows: list[MetricRow]
    left_out: list[str]


class ProbeResult(TypedDict):
    """Stage 1 by itself; there is no gain yet.

    `gain` is that of DPT, or of generated features where no images are generated. `gains`, with a ladder,
    are those of either over the probe and over each rung.
    """

    n_labels: int
    accuracy: list[AccuracyRow]
    gain: Gain | None
    gains: NotRequired[list[Gain]]
    pseudo_labels: PseudoLabelQuality | None


class Difference(TypedDict):
    """The paired difference of two accuracies on the same test images, and its standard error."""

    gain: float
    stderr: float


class LabelQuality(TypedDict):
    """The pseudo-labels of the training images: what share is right, and how it is spread.

    `accuracy` and the calibration error `ece` of the confidences are over the `n` images whose true label
    is known, None without any. `smallest` and `largest` are the shares of the rarest and of the most
    frequent class among all pseudo-labels.
    """

    accuracy: float | None
    ece: float | None
    n: int
    smallest: float
    largest: float


class ValidationDifference(Difference):
    """The same on the `n` validation images, which may be looked at before test is."""

    n: int


class LadderRow(TypedDict):
    """A rung: its accuracy on what it was chosen on and on test, its gains on test, and its seconds.

    `chosen_on` is "" for a method with nothing to choose. Gains are None without test images, for the
    method itself, and where there is no such rung. `seconds` are those that its own stages took when they
    were made; the features, which all rungs share, are not among them. `labels` is None for methods that
    label no training images, and lacking in results until 2026-11-26, as
    `over_balanced_validation` is: the gain over balanced self-training that decisions may rest on.
    """

    method: str
    chosen_on: str
    score: float | None
    score_stderr: float | None
    n: int
    test: float | None
    over_probe: Difference | None
    over_balanced: Difference | None
    seconds: float
    labels: NotRequired[LabelQuality | None]
    over_balanced_validation: NotRequired[ValidationDifference | None]


class LadderResult(ProbeResult):
    """The rungs of stage 1, measured before anything is spent on stage 2."""

    ladder: list[LadderRow]


class StudentResult(TypedDict):
    """The student beside its teacher, a key of `methods.METHODS`, encoder and classifier together.

    `gain` is paired over the same test images, None without any; `flops` are those for one image.
    """

    teacher: str
    gain: Difference | None
    parameters: int
    teacher_parameters: int
    flops: int
    teacher_flops: int


class EvaluationResult(ProbeResult):
    """All methods on the test images, and the measures of the generated images.

    `ladder` has the rows of the ladder, if there is one, and DPT's.
    """

    frechet: list[MetricRow]
    image_metrics: MetricsResult
    ladder: NotRequired[list[LadderRow]]
    student: NotRequired[StudentResult]


class StudyRun(EvaluationResult):
    """A run of a study: its evaluation, and STAGE/IDENTITY of what it rests on by node."""

    artifacts: dict[str, str]


class StudyResult(TypedDict):
    """What `study.json` holds; `runs` are by name."""

    command: str
    study: dict[str, Any]
    seconds: int
    code: str
    runs: dict[str, StudyRun]


def write_result(out: Artifact, file: str, result: Mapping[str, Any], rows: int) -> Facts:
    """Publish a result as `file`; return the facts of a stage that makes nothing else."""
    out.write_json(file, result)
    return {"rows": rows, "result": dict(result)}


def gain_over(result: ProbeResult, method: str) -> Gain | None:
    """Return the gain, of the method of `gain`, over a rung of the ladder; None where it was not measured."""
    # Those of DPT, if there is one, come first.
    return next((gain for gain in result.get("gains", ()) if gain["baseline"] == method), None)


def read_probe(artifact: Artifact) -> ProbeResult:
    """Return what a published probe holds."""
    return cast(ProbeResult, artifact.read_json(PROBE_FILE))


def read_ladder(artifact: Artifact) -> LadderResult:
    """Return what a published ladder holds."""
    return cast(LadderResult, artifact.read_json(LADDER_FILE))


def read_metrics(artifact: Artifact) -> MetricsResult:
    """Return what published image metrics hold."""
    return cast(MetricsResult, artifact.read_json(METRICS_FILE))


def read_evaluation(artifact: Artifact) -> EvaluationResult:
    """Return what a published evaluation holds."""
    return cast(EvaluationResult, artifact.read_json(EVALUATION_FILE))
