"""The rungs of stage 1: classifiers from a few labels and all features, and how their penalty is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dpt_ray.config.ladder import Prior, RungName
from dpt_ray.data.rows import Rows
from dpt_ray.evaluation.paired import binomial_stderr
from dpt_ray.learners.balance import estimate_prior
from dpt_ray.learners.linear_classifier import cross_entropy, logits
from dpt_ray.learners.linear_probe import fit, fit_stage
from dpt_ray.learners.propagation import propagate
from dpt_ray.learners.self_training import MOST_ITERATIONS, ROUNDS, balanced_labels, probabilities, self_train

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MOST_FOLDS = 5
# lambda = share / C of the fits on pseudo-labels: a class has 1 / C of the loss, so that a share means the
# same for any number of classes. Where nothing can be chosen on, the first one is used. On CIFAR-10, with two
# encoders and 1 to 25 labels per class, the best of each method lay in this range (docs/ladder.md).
SHARES = (0.03, 0.1, 0.01, 0.003)
# The same of stage 3 on generated features, which are fewer, balanced and without outliers.
GENERATED_SHARES = (0.001, 0.01, 0.0001, 0.00001)
# Decades below the configured l2 that the tuned probe chooses from.
DECADES = (0, 1, 2, 3)

ChosenOn = Literal["validation", "cross-validation", "none"]


@dataclass(frozen=True)
class Images:
    """The training images: rows `train` (n,) of the row-normalised `matrix` (m, dim).

    The few labels are `labels` (k,) of the `positions` (k,) in `train`. `graph` is S (n, n), for label
    propagation.
    """

    matrix: np.ndarray
    train: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    num_classes: int
    graph: csr_array | None = None

    @property
    def labelled(self) -> Rows:
        """The labelled rows."""
        return Rows(self.matrix, self.labels, self.train[self.positions])

    def without(self, held_out: np.ndarray) -> Images:
        """Return the same images without the labels `held_out` (positions in `labels`)."""
        kept = np.setdiff1d(np.arange(len(self.labels)), held_out)
        return Images(
            self.matrix,
            self.train,
            self.positions[kept],
            self.labels[kept],
            self.num_classes,
            self.graph,
        )


@dataclass(frozen=True)
class Rung:
    """A rung: its method, the l2 of the probe that it starts from, and the prior that it is balanced to."""

    method: RungName
    probe_l2: float
    prior: Prior = "uniform"

    @property
    def settings(self) -> tuple[float, ...]:
        """What to choose from: l2 of the tuned probe, else the share of lambda; the default comes first."""
        if self.method == "tuned_probe":
            return tuple(self.probe_l2 / 10**decade for decade in DECADES)
        return SHARES

    def classifier(self, images: Images, setting: float) -> np.ndarray:
        """Return the classifier (C, dim) with a setting."""
        return self.classifiers(images, [setting])[0]

    def classifiers(self, images: Images, settings: Sequence[float]) -> list[np.ndarray]:
        """Return the classifier (C, dim) of each setting; what does not depend on it is made once."""
        C = images.num_classes
        if self.method == "tuned_probe":
            return [fit([images.labelled], C, l2=l2).weights for l2 in settings]
        probe = fit([images.labelled], C, l2=self.probe_l2).weights
        scores = probabilities(images.matrix, images.train, probe)
        prior = None if self.method == "self_training" else class_prior(self.prior, images, scores)
        if self.method == "propagation":
            assert images.graph is not None  # the stage reads it for this method
            spread = propagate(images.graph, images.positions, images.labels, C)
            unreached = ~spread.any(axis=1)  # these keep what the probe says
            spread[unreached] = scores[unreached]
            targets = balanced_labels(spread, prior)
        else:
            targets = scores.argmax(axis=1)
        return [
            self_train(
                images.matrix,
                images.train,
                targets,
                (images.positions, images.labels),
                C,
                l2=share / C * len(images.train),
                prior=prior,
                rounds=ROUNDS if self.method == "balanced_rounds" else 1,
            )
            for share in settings
        ]


def class_prior(prior: Prior, images: Images, probabilities: np.ndarray) -> np.ndarray | None:
    """Return the prior (C,) that sums to 1, None for "none"; "estimated" from probabilities (n, C).

    Raises ValueError where a list has another number of classes.
    """
    C = images.num_classes
    if prior == "none":
        return None
    if prior == "uniform":
        return np.full(C, 1 / C)
    if prior == "estimated":
        # One image more of each class, so that none has the share 0.
        counts = np.bincount(images.labels, minlength=C) + 1.0
        return estimate_prior(probabilities, counts / counts.sum())
    if len(prior) != C:
        raise ValueError(f"a prior of {len(prior)} shares for {C} classes: give one for each")
    shares = np.array(prior, np.float64)
    return shares / shares.sum()


@dataclass(frozen=True)
class Chosen:
    """A rung's classifier and setting, with the decisions (n, C) and labels (n,) that it was judged on."""

    weights: np.ndarray
    setting: float
    on: ChosenOn
    decisions: np.ndarray
    labels: np.ndarray

    @property
    def top1(self) -> float | None:
        """The accuracy on what it was chosen on."""
        if self.on == "none":
            return None
        return float((self.decisions.argmax(axis=1) == self.labels).mean())

    @property
    def stderr(self) -> float | None:
        """The binomial standard error of `top1`."""
        return None if self.top1 is None else binomial_stderr(self.top1, len(self.labels))


def climb(rung: Rung, images: Images, validation: Rows, progress: Callable[[int, int], None]) -> Chosen:
    """Return the rung with its best setting: on validation images, else by cross-validation over the labels.

    `progress(done, total)` counts passes over the images. Without validation images the labels are held
    out in 2 to 5 folds, each of which leaves every class a label: with one label of a class there are none,
    and the first setting is taken. Ties go to the lower cross-entropy.
    """
    settings = rung.settings
    if len(validation):
        found = rung.classifiers(images, settings)
        progress(1, 1)
        decided = [logits(validation.features, W) for W in found]
        best = _best(decided, validation.labels)
        return Chosen(found[best], settings[best], "validation", decided[best], validation.labels)
    parts = folds(images.labels, images.num_classes)
    total = len(parts) + 1
    if not parts:
        W = rung.classifier(images, settings[0])
        progress(1, total)
        nothing = np.empty((0, images.num_classes), np.float32)
        return Chosen(W, settings[0], "none", nothing, images.labels[:0])
    decided = [np.empty((len(images.labels), images.num_classes), np.float32) for _ in settings]
    for number, held_out in enumerate(parts, 1):
        rows = images.matrix[images.train[images.positions[held_out]]]
        for W, decisions in zip(rung.classifiers(images.without(held_out), settings), decided, strict=True):
            decisions[held_out] = logits(rows, W)
        progress(number, total)
    best = _best(decided, images.labels)
    W = rung.classifier(images, settings[best])
    progress(total, total)
    return Chosen(W, settings[best], "cross-validation", decided[best], images.labels)


def from_generated(
    labelled: Rows, generated: Rows, validation: Rows, num_classes: int, real_weight: float | str
) -> Chosen:
    """Return stage 3 on generated rows (weight 1) and labelled ones, lambda chosen as that of a rung.

    There are no folds: the generated rows have seen all labels. Without validation images it is the first
    setting.
    """
    settings = GENERATED_SHARES if len(validation) else GENERATED_SHARES[:1]
    rows = len(labelled) + len(generated)

    def classifier(share: float) -> np.ndarray:
        l2 = share / num_classes * rows
        return fit_stage(labelled, generated, real_weight, num_classes, l2, MOST_ITERATIONS).weights

    found = [classifier(share) for share in settings]
    decided = [logits(validation.features, W) for W in found]
    if not len(validation):
        return Chosen(found[0], settings[0], "none", decided[0], validation.labels)
    best = _best(decided, validation.labels)
    return Chosen(found[best], settings[best], "validation", decided[best], validation.labels)


def folds(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return positions in `labels` (n,) to hold out together, each class spread evenly over the folds.

    There are as many folds as the rarest class has labels, at most 5, and none where that is one label.
    """
    counts = np.bincount(labels, minlength=num_classes)
    number = min(MOST_FOLDS, int(counts.min()))
    if number < 2:
        return []
    fold = np.empty(len(labels), np.int64)
    for label in range(num_classes):
        mine = np.flatnonzero(labels == label)
        fold[mine] = np.arange(len(mine)) % number
    return [np.flatnonzero(fold == k) for k in range(number)]


def _best(decided: Sequence[np.ndarray], labels: np.ndarray) -> int:
    """Return which decisions (n, C) are right most often; the lower cross-entropy decides a tie."""

    def quality(at: int) -> tuple[float, float]:
        decisions = decided[at]
        return float((decisions.argmax(axis=1) == labels).mean()), -cross_entropy(decisions, labels)

    return max(range(len(decided)), key=quality)
