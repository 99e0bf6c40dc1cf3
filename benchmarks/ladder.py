"""What the ladder of stage 1 costs: seconds and memory of graph, propagation and each rung's fits.

    python benchmarks/ladder.py [--rows 10000 100000] [--dim 256] [--classes 10] [--skip-graph]

Generated features: overlapping classes in `dim` dimensions, four labels of each. Each number of rows is
measured in a process of its own; memory is the growth of its peak beyond the features. A rung's seconds
are those of all four penalties that it chooses from. --skip-graph takes neighbours by the order of a
random projection instead of the exact ones, for 10^6 rows on a few cores: the propagation then has a
graph of the same size. Writes benchmarks/results/ladder_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine

RESULTS = Path(__file__).parent / "results"
NEIGHBOURS, LABELS = 20, 4


def drawn(rows: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features (rows, dim) of overlapping classes of unequal sizes, and the classes."""
    rng = np.random.default_rng(0)
    share = np.linspace(0.5, 1.5, classes)
    labels = rng.choice(classes, rows, p=share / share.sum())
    means = rng.standard_normal((classes, dim), dtype=np.float32)
    features = rng.standard_normal((rows, dim), dtype=np.float32)
    for start in range(0, rows, 4096):
        features[start : start + 4096] += 0.5 * means[labels[start : start + 4096]]
    return features, labels


def peak() -> int:
    """Return this process's peak memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of `work` with its seconds and the growth of the peak in GB."""
    before, started = peak(), time.perf_counter()
    found = work()
    return found, {"seconds": time.perf_counter() - started, "gigabytes": (peak() - before) / 1e9}


def exact_graph(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return neighbours and cosines as the stage computes them."""
    import torch

    from dpt_ray.learners.neighbours import BLOCK, centre_and_normalise, nearest

    rows = torch.from_numpy(centre_and_normalise(features.copy()))
    rows = rows.to("cuda" if torch.cuda.is_available() else "cpu")
    parts = [nearest(rows, at, min(at + BLOCK, len(rows)), NEIGHBOURS) for at in range(0, len(rows), BLOCK)]
    where, cosines = (torch.cat(list(columns)).cpu().numpy() for columns in zip(*parts, strict=True))
    return where.astype(np.int32), cosines


def cheap_graph(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return neighbours near by in a random projection, with cosines of 0.5: a graph of the same size."""
    rng = np.random.default_rng(1)
    order = np.argsort(features @ rng.standard_normal(features.shape[1], dtype=np.float32))
    place = np.argsort(order)
    shifts = rng.integers(1, 1000, NEIGHBOURS)
    where = order[(place[:, None] + shifts) % len(features)].astype(np.int32)
    return where, np.full(where.shape, 0.5, np.float32)


def measure(rows: int, dim: int, classes: int, skip_graph: bool) -> dict[str, Any]:
    """Return what each part costs at a number of rows."""
    from dpt_ray.config.ladder import RUNGS
    from dpt_ray.data.rows import row_normalise
    from dpt_ray.learners.balance import sinkhorn
    from dpt_ray.learners.ladder import Images, Rung
    from dpt_ray.learners.propagation import affinity, propagate

    features, labels = drawn(rows, dim, classes)
    found: dict[str, Any] = {"rows": rows, "feature_gigabytes": features.nbytes / 1e9}
    make = cheap_graph if skip_graph else exact_graph
    (where, cosines), cost = measured(lambda: make(features))
    if not skip_graph:
        found["graph"] = cost
    S, found["affinity"] = measured(lambda: affinity(where, cosines))
    found["edges"] = int(S.nnz)
    positions = np.concatenate([np.flatnonzero(labels == c)[:LABELS] for c in range(classes)])
    few = labels[positions]
    scores, found["solution"] = measured(lambda: propagate(S, positions, few, classes))
    _, found["sinkhorn"] = measured(partial(sinkhorn, scores, np.full(classes, 1 / classes)))
    found["accuracy"] = float((scores.argmax(axis=1) == labels).mean())
    del scores
    images = Images(row_normalise(features, out=features), np.arange(rows), positions, few, classes, S)
    for method in () if skip_graph else RUNGS:
        rung = Rung(method, 0.0025)
        _, found[method] = measured(partial(rung.classifiers, images, rung.settings))
    return found


def page(results: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Return the results as Markdown."""
    names = [name for name, value in results[-1].items() if isinstance(value, dict)]
    names = list(dict.fromkeys([*(name for name, v in results[0].items() if isinstance(v, dict)), *names]))
    head = "| | " + " | ".join(f"{found['rows']:,} rows" for found in results) + " |"
    lines = [head, "|---" * (len(results) + 1) + "|"]
    lines.append("| features, GB | " + " | ".join(f"{f['feature_gigabytes']:.2f}" for f in results) + " |")
    lines.append("| edges | " + " | ".join(f"{found['edges']:,}" for found in results) + " |")
    for name in names:
        cells = [
            f"{found[name]['seconds']:.1f} s, {found[name]['gigabytes']:.2f} GB" if name in found else ""
            for found in results
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    right = " | ".join(f"{100 * found['accuracy']:.1f} %" for found in results)
    lines.append(f"| propagated labels right | {right} |")
    command = f"python benchmarks/ladder.py {' '.join(sys.argv[1:])}".strip()
    about = (
        f"{machine('torch', 'scipy', 'numpy')}. {arguments.classes} classes, {arguments.dim} dimensions, "
        f"{NEIGHBOURS} neighbours, {LABELS} labels of each class. Seconds, and how much the peak of the "
        "process grew: parts that need less than an earlier one grew nothing. A rung is measured with the "
        "four penalties that it chooses from; `solution` is the propagation alone."
    )
    return (
        f"# The ladder, {datetime.now(UTC):%Y-%m-%d}\n\n`{command}`\n\n{about}\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--skip-graph", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        found = measure(arguments.one, arguments.dim, arguments.classes, arguments.skip_graph)
        sys.stdout.write(json.dumps(found))
        return
    results = []
    for rows in arguments.rows:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", str(rows)], check=True, stdout=subprocess.PIPE
        )
        results.append(json.loads(done.stdout))
    text = page(results, arguments)
    suffix = "_propagation" if arguments.skip_graph else ""
    (RESULTS / f"ladder{suffix}_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
