"""Which pseudo-labels to trust: plain confidence against measures of uncertainty, on the features of runs.

    python benchmarks/uncertainty.py RUNS/NAME... [--members 16]

RUNS/NAME are folders of runs whose training images have true labels, which only measure here; a study's
differ in their label draws. The probe of a run labels its training images. A way to trust labels is measured
by how many of them are right among the tenth and the third of each predicted class that it trusts most.
NP-Match (arXiv 2207.01066) has a neural process in this place, whose samples of a latent variable are an
ensemble of classifiers; cheaper ensembles stand for it here:

- subspaces: fits on random halves of the features (Ho, 1998);
- dropout: the probe with half of the features left out at random (Gal and Ghahramani, 2016).

Of each, the confidence of the mean prediction, its negative entropy (NP-Match's), and the agreement: the
negative mutual information between the prediction and the member. The last column has all labels, so what
an ensemble's better labels bring and what the choice among them brings can be told apart. Writes
benchmarks/results/uncertainty_DATE.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import write_result
from scipy.special import entr

from dpt_ray.config import load_config
from dpt_ray.data.rows import RealRows, Rows
from dpt_ray.evaluation.paired import PairedGain, paired_gain
from dpt_ray.learners.linear_classifier import load_classifier, probabilities
from dpt_ray.learners.linear_probe import fit_stage
from dpt_ray.pipeline.run_folder import sets_made

SHARES = (0.1, 1 / 3, 1.0)
PLAIN = "confidence of the probe"

# What a way says of n images: their labels (n,) and how far each is to be trusted (n,).
Said = tuple[np.ndarray, np.ndarray]


def ways(
    train: np.ndarray, labelled: Rows, W: np.ndarray, temperature: float, l2: float, members: int
) -> dict[str, Said]:
    """Return what each way says of the training images, features (n, dim), by the probe W (C, dim)."""
    rng, dim = np.random.default_rng(0), train.shape[1]
    p = probabilities(train, W, temperature)
    said: dict[str, Said] = {PLAIN: (p.argmax(1), p.max(1))}
    said["entropy of the probe"] = p.argmax(1), -entr(p).sum(1)
    masks = [rng.permutation(dim) < dim // 2 for _ in range(members)]
    fits = [
        fit_stage(Rows(labelled.features * mask, labelled.labels), None, 1.0, len(W), l2).weights
        for mask in masks
    ]
    ensembles = {"subspaces": fits, "dropout": [2 * W * mask for mask in masks]}
    for name, weights in ensembles.items():
        mean, expected = np.zeros_like(p), np.zeros(len(p))
        for member in weights:
            q = probabilities(train, member, temperature)
            mean += q / members
            expected += entr(q).sum(1) / members
        # I(y; member) = H(mean_m q_m) - mean_m H(q_m)
        said[f"{name}, confidence"] = mean.argmax(1), mean.max(1)
        said[f"{name}, entropy"] = mean.argmax(1), -entr(mean).sum(1)
        said[f"{name}, agreement"] = mean.argmax(1), expected - entr(mean).sum(1)
    return said


def right(said: Said, truth: np.ndarray, share: float) -> float:
    """Return, in percent, how many labels are right among a share of each predicted class."""
    labels, trust = said
    chosen = [
        rows[np.argsort(-trust[rows], kind="stable")[: max(1, round(share * len(rows)))]]
        for rows in (np.flatnonzero(labels == label) for label in np.unique(labels))
    ]
    found = np.concatenate(chosen)
    return 100 * float((labels[found] == truth[found]).mean())


def measure(folder: Path, members: int) -> tuple[int, int, dict[str, list[float]]]:
    """Return a run's labels per class, its draw, and for each way the percentages at `SHARES`."""
    config = load_config(folder / "config.yaml", [])
    made = next(iter(sets_made(config)))
    real = RealRows(made["index"], made["features"], ("train",), made["labels"])
    train = real.of_split("train")
    temperature = made["pseudo_labels"].manifest["calibration"]["temperature"]
    W = load_classifier(made["classifier"])
    said = ways(train.features, real.labelled(made["labels"]), W, temperature, config.classifier.l2, members)
    assert config.labels.per_class is not None
    found = {way: [right(what, train.labels, share) for share in SHARES] for way, what in said.items()}
    return config.labels.per_class, config.labels.seed, found


def lines(results: Sequence[tuple[int, int, dict[str, list[float]]]]) -> list[str]:
    """Return the table: means, and differences from plain confidence paired over draws."""
    by_count = defaultdict(list)
    for count, draw, found in results:
        by_count[count].append((draw, found))
    rows = []
    for count, runs in sorted(by_count.items()):
        for way in runs[0][1]:
            cells = []
            for k in range(len(SHARES)):
                mean = paired_gain((0, draw, found[way][k]) for draw, found in runs)
                gain = paired_gain((0, draw, found[way][k] - found[PLAIN][k]) for draw, found in runs)
                cells.append(_text(mean, "") if way == PLAIN else _text(gain, "+"))
            rows.append(f"| {count} | {len(runs)} | {way} | {' | '.join(cells)} |")
    return rows


def _text(found: PairedGain, sign: str) -> str:
    error = "" if found.stderr is None else f" ± {found.stderr:.1f}"
    return f"{found.mean:{sign}.1f}{error}"


def main() -> None:
    """Measure the runs and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--members", type=int, default=16)
    arguments = parser.parse_args()
    results = [measure(folder, arguments.members) for folder in arguments.runs]
    names = " ".join(folder.name for folder in arguments.runs)
    how = (
        f"`python benchmarks/uncertainty.py` with the runs {names}. {arguments.members} members. Percentage "
        "of right labels among the most trusted of each predicted class: those of the probe's confidence, "
        "and for the other ways the difference from it, mean ± standard error over label draws"
    )
    columns = ["labels per class", "draws", "trust", "a tenth", "a third", "all"]
    write_result(
        "uncertainty", "Which pseudo-labels to trust", how, columns, lines(results), ["numpy", "torch"]
    )


if __name__ == "__main__":
    main()
