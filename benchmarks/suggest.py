"""What suggested labels are worth: the probe from them against as many labels drawn at random.

    python benchmarks/suggest.py CONFIG [KEY=VALUE]... [--counts 10 40 250] [--seeds 3] [--draws 10]

The run's index must have true labels for training and test images; its index and features are used as they
are published. Each row is a mean over seeds of k-means, or over draws, with the standard error; `missed` is
the mean number of classes without a label. Writes benchmarks/results/suggest_NAME_DATE.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from machine import machine

from dpt_ray.config import load_config
from dpt_ray.data.rows import RealRows, Rows
from dpt_ray.learners.linear_classifier import accuracy
from dpt_ray.learners.linear_probe import fit_stage
from dpt_ray.learners.suggestion import suggest
from dpt_ray.pipeline.run_folder import sets_made

RESULTS = Path(__file__).parent / "results"
NONE = np.array([], int)


class Set:
    """Training rows with true labels, and the test rows that the probe is measured on."""

    def __init__(self, features: np.ndarray, train: Rows, test: Rows, classes: int, l2: float) -> None:
        """`features` are all of both, row-normalised."""
        assert train.index is not None
        self.matrix, self.rows, self.labels = features, train.index, train.labels
        self.train = features[train.index]
        self.test, self.classes, self.l2 = test, classes, l2

    def suggested(self, count: int, seed: int) -> np.ndarray:
        """Return the positions of suggested images."""
        return suggest(self.train, count, NONE, seed)

    def uniform(self, count: int, seed: int) -> np.ndarray:
        """Return positions drawn uniformly at random, without replacement."""
        return np.random.default_rng(seed).choice(len(self.labels), count, replace=False)

    def balanced(self, count: int, seed: int) -> np.ndarray:
        """Return positions drawn at random, as many of each class (by its true label)."""
        rng = np.random.default_rng(seed)
        each = [
            rng.choice(np.flatnonzero(self.labels == label), count // self.classes, replace=False)
            for label in range(self.classes)
        ]
        return np.concatenate(each)

    def measure(self, chosen: np.ndarray) -> tuple[float, int]:
        """Return the probe's test top-1 in percent from these labels, and the number of missed classes."""
        labels = self.labels[chosen]
        found = fit_stage(Rows(self.matrix, labels, self.rows[chosen]), None, 1.0, self.classes, self.l2)
        return 100 * (accuracy(found.weights, self.test) or 0.0), self.classes - len(set(labels.tolist()))


def row(data: Set, name: str, draw: Callable[[int, int], np.ndarray], count: int, repeats: int) -> str:
    """Return a line of the table."""
    clock = time.perf_counter()
    drawn = [draw(count, seed) for seed in range(repeats)]
    seconds = (time.perf_counter() - clock) / repeats
    top1, missed = np.array([data.measure(chosen) for chosen in drawn]).T
    error = top1.std(ddof=1) / repeats**0.5 if repeats > 1 else float("nan")
    return (
        f"| {count} | {name} | {top1.mean():.1f} +- {error:.1f} | {missed.mean():.1f} ({missed.min():.0f} to "
        f"{missed.max():.0f}) | {repeats} | {seconds:.1f} |"
    )


def table(data: Set, counts: list[int], seeds: int, draws: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "| labels | chosen | test top-1, % | classes missed | repeats | seconds to choose |",
        "|---" * 6 + "|",
    ]
    for count in counts:
        lines.append(row(data, "suggested", data.suggested, count, seeds))
        lines.append(row(data, "uniformly at random", data.uniform, count, draws))
        if count % data.classes == 0:
            lines.append(row(data, "at random, as many of each class", data.balanced, count, draws))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 40, 250])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=10)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    made = next((made for made in sets_made(config) if "features" in made), None)
    if made is None:
        parser.error(f"run {config.name} has no features: run `dpt extract` first")
    real = RealRows(made["index"], made["features"], ("train", "test"))
    train, test = real.of_split("train"), real.of_split("test")
    data = Set(real.features, train, test, len(real.classes), config.classifier.l2)
    about = (
        f"{machine('scikit-learn', 'numpy', 'torch')}. {len(train):,} training and {len(test):,} test "
        f"images, {len(real.classes)} classes, {real.features.shape[1]} dimensions. Test top-1 of the probe "
        f"(l2 {config.classifier.l2:g}), mean and standard error over repeats: seeds of k-means, or draws."
    )
    text = (
        f"# Suggested labels, {config.name}, {datetime.now(UTC):%Y-%m-%d}\n\n"
        f"`python benchmarks/suggest.py {' '.join(sys.argv[1:])}`\n\n{about}\n\n"
        + table(data, arguments.counts, arguments.seeds, arguments.draws)
    )
    (RESULTS / f"suggest_{config.name}_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
