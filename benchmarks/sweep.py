"""A sweep of 100 linear trials through Ray Tune, against a bare loop over the same fits.

    python benchmarks/sweep.py [--images 128] [--rounds 3]

The trials are those of a run of the digits: stage 3 with five numbers of images per class, five weights and
four penalties. The loop fits them one after another in this process and publishes as the trials do; the
sweep runs two at a time, a thread each. Its start-up is left out, it is stated apart. The longer a fit is,
the less the sweep adds to it: a fit here is one of the shortest there are.
Writes benchmarks/results/sweep_DATE.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
from common import DIGITS, dpt, write_result

from dpt_ray.config import Config
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.sweep import grid, run_trial
from dpt_ray.store.artifact import Artifact, Store

SETTINGS = (
    *("evaluate.controls=false", "pretrain.steps=50", "diffusion.steps=50", "generate.nfe=2"),
    *("compute.train_workers=0", "compute.actors=2", "compute.threads=1"),
    "sweep.real_weight=[1.0, 2.0, 4.0, 8.0, balanced]",
    "sweep.l2=[0.00025, 0.0025, 0.025, 0.25]",
)


def loop(config: Config, out: Artifact) -> tuple[int, float]:
    """Fit all trials one after another; return how many, and the seconds."""
    node, store = flow(config)["sweep"], Store(config.output)
    inputs = {name: source.artifact(store) for name, source in node.inputs.items()}
    trials = grid(node.settings, inputs, choosing=True)
    started = time.perf_counter()
    for trial in trials:
        run_trial(trial, inputs, out, 1, node.settings.max_iterations)
    return len(trials), time.perf_counter() - started


def main() -> None:
    """Measure and write the result."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=int, default=128, help="of each class, at most")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    most = options.images
    counts = f"sweep.images_per_class=[{most // 8}, {most // 4}, {most // 2}, {3 * most // 4}, {most}]"
    rates: dict[str, list[float]] = {"the sweep": [], "the loop": []}
    startups = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            given = (
                *SETTINGS,
                counts,
                f"generate.images_per_class={most}",
                f"retrain.images_per_class={most}",
            )
            # Another limit is another sweep of the same images.
            given = (*given, f"sweep.max_iterations={1000 + number}", f"output={scratch}/out")
            config = dpt("sweep", DIGITS, *given)
            manifest = flow(config)["sweep"].artifact(Store(config.output)).manifest
            startups.append(manifest["startup_seconds"])
            trials = len(manifest["trials"])
            rates["the sweep"].append(60 * trials / (manifest["seconds"] - startups[-1]))
            trials, seconds = loop(config, Artifact(f"{scratch}/loop{number}"))
            rates["the loop"].append(60 * trials / seconds)
    ratio = np.array(rates["the sweep"]) / np.array(rates["the loop"])
    lines = [
        *(f"| {name} | {min(found):,.0f} to {max(found):,.0f} |" for name, found in rates.items()),
        "",
        f"The sweep does {ratio.min():.2f} to {ratio.max():.2f} of the loop's trials in a minute, after a "
        f"start-up of {min(startups):.0f} to {max(startups):.0f} s.",
    ]
    how = (
        f"`python benchmarks/sweep.py --images {most} --rounds {options.rounds}`: {trials} trials of at most "
        f"{10 * most} images of the digits, two at a time; the range of {options.rounds} rounds."
    )
    write_result("sweep", "Trials of a sweep", how, ("", "trials/min"), lines, ["ray"])


if __name__ == "__main__":
    main()
