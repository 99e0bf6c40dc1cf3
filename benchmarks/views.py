"""Which thread or process draws the views of a semi-supervised step best.

    python benchmarks/views.py [--rounds 3] [--steps 8]

A batch of 8 labelled and 40 unlabelled images (88 views) is drawn for every step, by torchvision as
`batch_views` has it, of photographs (224 of 256 pixels) and of small images (32 pixels). The step itself
waits for half the seconds that one core takes to draw the batch: a GPU that computes. The ways take turns,
each in a process of its own, so that they share whatever else the machine does, and ratios are within a
round. Seconds of the processor do not depend on what else it does: those of the thread that trains are what
a GPU would wait for, those of all threads and processes are what a training on the CPU pays. Ray Data draws
a batch a row, in actors, and hands it over through the object store; of its processes the actors from their
birth on, the raylet and the GCS count. Writes benchmarks/results/views_DATE.md.
"""

from __future__ import annotations

import argparse
import json
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
from typing import NamedTuple

import numpy as np
import torch
from machine import machine
from processes import apart, processor_seconds

from dpt_ray.cluster.session import connect
from dpt_ray.config.sections import Compute
from dpt_ray.learners.weak_strong import Draw, batch_views, photograph_views, small_image_views
from dpt_ray.training.prefetch import Load, prefetch
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Batch

RESULTS = Path(__file__).parent / "results"
LABELLED, RATIO = 8, 5
VIEWS = LABELLED * (1 + 2 * RATIO)
SIZES = {"photographs": (256, 224), "small_images": (32, 32)}
ACTOR = "actor"  # column of a batch: the process that drew it, and its processor seconds since its birth
SECONDS: dict[float, float] = {}  # the last ones of each actor


class Way(NamedTuple):
    """What draws: the thread that trains (None), a thread beside it (0), or so many processes or actors."""

    processes: int | None
    by_ray: bool = False


WAYS = {
    "thread that trains": Way(None),
    "thread beside it": Way(0),
    "1 process": Way(1),
    "2 processes": Way(2),
    "1 actor of Ray Data": Way(1, by_ray=True),
    "2 actors of Ray Data": Way(2, by_ray=True),
}


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


def batch_of(kind: str) -> Load:
    load, draw = drawer(kind)
    return lambda step: draw(load(step), StepRandom(0, step, 0, LABELLED))


class Drawing:
    """An actor of Ray Data: draws the batch of each row's step, on one thread as torch's processes do."""

    def __init__(self, kind: str) -> None:
        torch.set_num_threads(1)
        self.drawn = batch_of(kind)
        self.born = time.process_time()

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch = {name: value.numpy()[None] for name, value in self.drawn(int(rows["id"][0])).items()}
        return {**batch, ACTOR: np.array([[os.getpid(), time.process_time() - self.born]])}


def by_ray(kind: str, actors: int, steps: int) -> Iterator[Batch]:
    """Yield the batches that so many actors draw, in order."""
    import ray

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    # Not ray.data.range: its tasks would wait for the CPUs that the actors hold.
    rows = ray.data.from_items([{"id": step} for step in range(steps)], override_num_blocks=steps)
    how = {"batch_size": 1, "num_cpus": 1, "compute": ray.data.ActorPoolStrategy(size=actors)}
    drawn = rows.map_batches(Drawing, fn_constructor_args=(kind,), **how)
    for batch in drawn.iter_batches(batch_size=1, prefetch_batches=1, batch_format="numpy"):
        actor, seconds = batch.pop(ACTOR)[0]
        SECONDS[actor] = seconds
        # Arrays of the object store cannot be written to, and a training may: torch would warn.
        yield {name: torch.from_numpy(value[0].copy()) for name, value in batch.items()}


def steps_of(kind: str, way: Way, steps: int) -> Iterator[Batch]:
    if way.by_ray:
        yield from by_ray(kind, way.processes or 1, steps)
        return
    drawn = batch_of(kind)
    if way.processes is None:
        for step in range(steps):
            yield drawn(step)
        return
    with closing(prefetch(drawn, range(steps), way.processes)) as batches:
        for batch, _ in batches:
            yield batch


def measured(kind: str, way: Way, wait: float, steps: int) -> tuple[float, float, float]:
    """Seconds of a step: by the clock, of the processor in this thread, of the processor in all."""
    warm = 2
    others = _seconds_of_ray if way.by_ray else _seconds_of_children
    children = others()
    found = steps_of(kind, way, steps + warm)
    for _ in range(warm):
        next(found)
    clock, own, everything = time.perf_counter(), time.thread_time(), time.process_time()
    for _ in found:
        time.sleep(wait)
    clock, own = (time.perf_counter() - clock) / steps, (time.thread_time() - own) / steps
    everything = (time.process_time() - everything) / steps
    # Processes have drawn the first steps, too.
    return clock, own, everything + (others() - children) / (steps + warm)


def _seconds_of_ray() -> float:
    """Processor seconds of Ray's own processes, and of actors from their birth on."""
    daemons = ("raylet", "gcs_server")
    own = processor_seconds(os.getpid()).values()
    return sum(seconds for name, seconds in own if name in daemons) + sum(SECONDS.values())


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
        for name in WAYS:
            told = {"kind": kind, "way": name, "wait": alone / 2, "steps": steps}
            [seconds] = apart([__file__, *(f"--{key}={value}" for key, value in told.items())], [{}])
            found[name].append(seconds)
    rows = []
    for name, seconds in found.items():
        of_first = zip(found["thread that trains"], seconds, strict=True)
        speed = median(first[0] / own[0] for first, own in of_first)
        clock, own, everything = (1000 * median(part) for part in zip(*seconds, strict=True))
        rows.append(f"| {kind} | {name} | {own:.1f} | {everything:.0f} | {clock:.0f} | {speed:.2f} |")
    return alone, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--way", choices=WAYS, help="one way in this process, its seconds as JSON")
    parser.add_argument("--kind", choices=SIZES)
    parser.add_argument("--wait", type=float)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "This DataLoader will create")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.way:
        way = WAYS[options.way]
        if way.by_ray:
            connect(Compute())
        sys.stdout.write(f"\n{json.dumps(measured(options.kind, way, options.wait, options.steps))}\n")
        return
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

{machine("torch", "torchvision", "ray")}. {LABELLED} labelled and {LABELLED * RATIO} unlabelled images, \
{VIEWS} views a step. One core draws: {each}. Medians of {options.rounds} rounds. \
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
