"""Which thread or process draws the views of a semi-supervised step best.

    python benchmarks/views.py [--rounds 3] [--steps 8]

A batch of 8 labelled and 40 unlabelled images (88 views) is drawn for every step, by torchvision as
`batch_views` has it, of photographs (224 of 256 pixels) and of small images (32 pixels). The step itself
waits for half the seconds that one core takes to draw the batch: a GPU that computes. The ways take turns,
so that they share whatever else the machine does, and ratios are within a round. Seconds of the processor
do not depend on what else it does: those of the thread that trains are what a GPU would wait for, those of
all threads and processes are what a training on the CPU pays. Writes benchmarks/results/views_DATE.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from machine import machine

from dpt_ray.learners.weak_strong import Draw, batch_views, photograph_views, small_image_views
from dpt_ray.training.prefetch import Load, prefetch
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Batch

RESULTS = Path(__file__).parent / "results"
LABELLED, RATIO = 8, 5
VIEWS = LABELLED * (1 + 2 * RATIO)
SIZES = {"photographs": (256, 224), "small_images": (32, 32)}
WAYS = {"thread that trains": None, "thread beside it": 0, "1 process": 1, "2 processes": 2}


def images(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        # Smooth, since the time of some operations depends on the content.
        coarse = torch.rand(LABELLED, *shape, 3, 8, 8, generator=generator).flatten(0, -4)
        fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
        return (255 * fine).to(torch.uint8).unflatten(0, (LABELLED, *shape))

    return {"image": drawn(), "unlabelled": drawn(RATIO)}


def drawer(kind: str) -> tuple[Load, Draw]:
    """The batch of a step without views, and what draws them."""
    stored, size = SIZES[kind]
    views = {"photographs": photograph_views, "small_images": small_image_views}[kind](size)
    batch = images(stored)
    return lambda step: batch, batch_views(views, views.strong)


def steps_of(kind: str, processes: int | None, steps: int) -> Iterator[Batch]:
    load, draw = drawer(kind)

    def drawn(step: int) -> Batch:
        return draw(load(step), StepRandom(0, step, 0, LABELLED))

    if processes is None:
        for step in range(steps):
            yield drawn(step)
        return
    with closing(prefetch(drawn, range(steps), processes)) as batches:
        for batch, _ in batches:
            yield batch


def measured(kind: str, processes: int | None, wait: float, steps: int) -> tuple[float, float, float]:
    """Seconds of a step: by the clock, of the processor in this thread, of the processor in all."""
    warm = 2
    children = _seconds_of_children()
    found = steps_of(kind, processes, steps + warm)
    for _ in range(warm):
        next(found)
    clock, own, everything = time.perf_counter(), time.thread_time(), time.process_time()
    for _ in found:
        time.sleep(wait)
    clock, own = (time.perf_counter() - clock) / steps, (time.thread_time() - own) / steps
    everything = (time.process_time() - everything) / steps
    # Processes have drawn the first steps, too.
    return clock, own, everything + (_seconds_of_children() - children) / (steps + warm)


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def drawing(kind: str) -> float:
    """Processor seconds that one core takes to draw a batch."""
    load, draw = drawer(kind)
    found = []
    for step in range(5):
        started = time.process_time()
        draw(load(step), StepRandom(0, step, 0, LABELLED))
        found.append(time.process_time() - started)
    return median(found)


def measure(kind: str, rounds: int, steps: int) -> tuple[float, list[str]]:
    """The seconds of drawing a batch on one core, and the rows of the table."""
    alone = drawing(kind)
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, processes in WAYS.items():
            found[way].append(measured(kind, processes, alone / 2, steps))
    rows = []
    for way, seconds in found.items():
        of_first = zip(found["thread that trains"], seconds, strict=True)
        speed = median(first[0] / own[0] for first, own in of_first)
        clock, own, everything = (1000 * median(part) for part in zip(*seconds, strict=True))
        rows.append(f"| {kind} | {way} | {own:.1f} | {everything:.0f} | {clock:.0f} | {speed:.2f} |")
    return alone, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "This DataLoader will create")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cost, rows = {}, []
    for kind in SIZES:
        cost[kind], found = measure(kind, options.rounds, options.steps)
        rows += found
    each = "; ".join(
        f"{kind} {1000 * seconds / VIEWS:.2f} ms a view, {VIEWS / seconds:.0f} views/s"
        for kind, seconds in cost.items()
    )
    text = f"""# Drawing the views of a semi-supervised step, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/views.py --rounds {options.rounds} --steps {options.steps}`

{machine("torch", "torchvision")}. {LABELLED} labelled and {LABELLED * RATIO} unlabelled images, {VIEWS} \
views a step. One core draws: {each}. Medians of {options.rounds} rounds. \
The clock is worth no more than the load allows: its ratio to the first row is within a round.

| views | drawn by | processor ms of the thread that trains | processor ms of all | clock ms | speed |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"views_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
