"""What the linear probe costs against scikit-learn and cyanure: seconds, memory, objective.

    python benchmarks/linear_probe.py [--rows 20000] [--dim 256] [--classes 50] [--pairs 2]

cyanure (which the paper's code uses) takes part where it is installed: `pip install cyanure`.
The same rows, objective and thread, each fit in a process of its own, the two in turn so that they share
whatever else the machine does. Seconds are those of the processor. Memory is that of a few iterations on
ten times the rows. Writes benchmarks/results/linear_probe_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.special import logsumexp

RESULTS = Path(__file__).parent / "results"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
L2 = 0.0025
# scikit-learn's on the gradient, cyanure's on the duality gap: both then end at the objective that ours does
TOLERANCE = 1e-9
FEW = 5


def drawn(rows: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes in directions of unequal variance, as an encoder's features have them."""
    from dpt_ray.data.rows import row_normalise

    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=rows)
    means = 0.3 * rng.standard_normal((classes, dim), dtype=np.float32)
    scale = np.exp(rng.standard_normal(dim, dtype=np.float32))
    features = rng.standard_normal((rows, dim), dtype=np.float32)
    for row, label in zip(features, labels, strict=True):  # in place: the peak is to be the fit's
        row += means[label]
        row *= scale
    return row_normalise(features, out=features), labels


def of_dpt_ray(features: np.ndarray, labels: np.ndarray, classes: int, cap: int) -> tuple[np.ndarray, int]:
    """(weights, iterations) of this project's fit."""
    from dpt_ray.data.rows import Rows
    from dpt_ray.learners.linear_probe import fit

    found = fit([Rows(features, labels)], classes, l2=L2, max_iterations=cap, device="cpu")
    return found.weights, found.iterations


def of_scikit_learn(
    features: np.ndarray, labels: np.ndarray, classes: int, cap: int
) -> tuple[np.ndarray, int]:
    """(weights, iterations) of LogisticRegression at the same objective, in double precision as ours."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / L2, fit_intercept=False, tol=TOLERANCE, max_iter=cap)
    model.fit(features.astype(np.float64), labels)
    return model.coef_, int(model.n_iter_[0])


def of_cyanure(features: np.ndarray, labels: np.ndarray, classes: int, cap: int) -> tuple[np.ndarray, int]:
    """(weights, iterations) of cyanure's Classifier at the same objective, in double precision as ours."""
    from cyanure.estimators import Classifier

    options = {"penalty": "l2", "lambda_1": L2 / len(features), "fit_intercept": False, "tol": TOLERANCE}
    model = Classifier(
        loss="multiclass-logistic", **options, max_iter=cap, verbose=False, n_threads=1, random_state=0
    )
    model.fit(features.astype(np.float64), labels)
    return model.get_weights().T, int(model.n_iter_[0])


FITS = {"dpt_ray": of_dpt_ray, "scikit-learn": of_scikit_learn}
if find_spec("cyanure"):
    FITS["cyanure"] = of_cyanure


def measure(who: str, rows: int, dim: int, classes: int, cap: int) -> dict[str, Any]:
    """One fit in this process, after a small one that does the imports."""
    warnings.filterwarnings("ignore")  # scikit-learn's, that the cap was reached
    FITS[who](*drawn(200, 8, 3), 3, cap)
    features, labels = drawn(rows, dim, classes)
    before, started = _peak(), time.process_time()
    W, iterations = FITS[who](features, labels, classes, cap)
    seconds, grown = time.process_time() - started, _peak() - before
    penalty = L2 / rows / 2 * np.square(W, dtype=float).sum()
    logits = features @ W.T.astype(np.float64)
    loss = (logsumexp(logits, axis=1) - logits[np.arange(rows), labels]).mean() + penalty
    return {"seconds": seconds, "grown": grown, "objective": float(loss), "iterations": iterations}


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found, "needs Linux's /proc"
    return 1024 * int(found[1])


def measured_apart(who: str, rows: int, size: argparse.Namespace, cap: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    options = [f"--rows={rows}", f"--dim={size.dim}", f"--classes={size.classes}", f"--cap={cap}"]
    command = [sys.executable, __file__, f"--only={who}", *options]
    run = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def table(fits: dict[str, list[dict[str, Any]]], memory: dict[str, int], size: argparse.Namespace) -> str:
    """The result as Markdown."""
    ratios = "; ".join(f"of {who} {_ratios(fits['dpt_ray'], fits[who])}" for who in fits if who != "dpt_ray")
    lines = [
        f"| {who} | {median(run['seconds'] for run in runs):.1f} | {runs[0]['iterations']} "
        f"| {runs[0]['objective']:.10f} | {memory[who] / 1e6:.0f} MB |"
        for who, runs in fits.items()
    ]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *list(fits)[1:], "scipy", "numpy"))
    megabytes = size.rows * 10 * size.dim * 4 / 1e6
    return f"""# The linear probe, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/linear_probe.py --rows {size.rows} --dim {size.dim} --classes {size.classes}\
 --pairs {size.pairs}`

One thread of {cpu[1] if cpu else platform.machine()}, {versions}; load average at the end \
{os.getloadavg()[0]:.1f}. All fits in double precision, the others with tol={TOLERANCE:g}. Seconds of \
the processor, medians of {size.pairs} runs in turn. Memory is the growth of the peak in {FEW} iterations on \
ten times the rows, whose features take {megabytes:.0f} MB in float32.

| | seconds | iterations | objective | memory beyond the features |
|---|---|---|---|---|
{chr(10).join(lines)}

Seconds of dpt_ray over those {ratios}, turn by turn.
"""


def _ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    return ", ".join(f"{a['seconds'] / b['seconds']:.2f}" for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--cap", type=int, default=100_000, help="most iterations, with --only")
    parser.add_argument("--only", choices=FITS, help="one fit in this process, its measures as JSON")
    size = parser.parse_args()
    if size.only:
        sys.stdout.write(json.dumps(measure(size.only, size.rows, size.dim, size.classes, size.cap)))
        return
    fits: dict[str, list[dict[str, Any]]] = {who: [] for who in FITS}
    for _ in range(size.pairs):
        for who, runs in fits.items():
            runs.append(measured_apart(who, size.rows, size, size.cap))
    memory = {who: measured_apart(who, size.rows * 10, size, FEW)["grown"] for who in FITS}
    text = table(fits, memory, size)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"linear_probe_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
