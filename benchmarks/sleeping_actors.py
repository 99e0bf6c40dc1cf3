"""What Ray Data and the driver keep busy: pools of actors that sleep for a GPU's time.

    python benchmarks/sleeping_actors.py [--actors 1 8 24 96] [--torch 8 24] [--seconds 30] [--units 3]

A head on this machine pretends a GPU and a CPU for each actor. A pass of `units` x actors units goes through
`cluster.units`, as every stage on actors does. An actor only sleeps, so the cores of this machine do nothing
but start its process, move its units and run the driver; on a real cluster each machine starts its own. Pools
are measured bare and with what an actor of a stage imports (torch).
Writes benchmarks/results/sleeping_actors_DATE.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from machine import machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers.cluster import SCRATCH, free_ports, ray_start
from tests.helpers.processes import kill_session

RESULTS = Path(__file__).parent / "results"


class Sleep:
    """An actor that sleeps for each unit, and tells when, and what its birth cost."""

    def __init__(self, seconds: float, imports: bool) -> None:
        if imports:
            import torch

            import dpt_ray.models.denoiser

            assert torch and dpt_ray.models.denoiser
        self.seconds, self.birth = seconds, time.process_time()
        self.computing = threading.Lock()  # as the actors of the stages: one unit at a time

    def __call__(self, unit: dict[str, str]) -> dict[str, Any]:
        """Sleep for a unit."""
        with self.computing:
            began = time.time()
            time.sleep(self.seconds)
            return {"actor": os.getpid(), "began": began, "ended": time.time(), "birth": self.birth}


def pool(actors: int, seconds: float, units: int, imports: bool) -> list[str]:
    """The row of a pool: births, their cost, and the busy share."""
    from dpt_ray.cluster.session import connect
    from dpt_ray.cluster.units import stream_units
    from dpt_ray.config.sections import Compute

    compute = Compute(actors=actors, actor_gpus=1.0, actor_cpus=0.5)
    connect(compute)
    asked = time.time()
    work = [{"shard": str(number)} for number in range(units * actors)]
    given = {"seconds": seconds, "imports": imports}
    done = list(stream_units(work, None, Sleep, given, compute))
    first: dict[int, float] = {}
    for row in done:
        first[row["actor"]] = min(row["began"], first.get(row["actor"], row["began"]))
    born, end = max(first.values()), max(row["ended"] for row in done)
    until = min(max(row["ended"] for row in done if row["actor"] == actor) for actor in first)
    whole = sum(row["ended"] - row["began"] for row in done) / (actors * (end - asked))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [
        f"{actors} ({'with torch' if imports else 'bare'})",
        f"{min(first.values()) - asked:.1f}",
        f"{born - asked:.1f}",
        f"{median(row['birth'] for row in done):.2f}",
        f"{whole:.2f}",
        f"{busy(done, actors, asked + 60, until):.2f}" if until > asked + 60 else "-",
        f"{busy(done, actors, born, until):.2f}" if until > born else "-",
        f"{peak:.2f}",
    ]


def busy(done: list[dict[str, Any]], actors: int, start: float, end: float) -> float:
    """The share of a span in which the actors work."""
    spans = (max(0.0, min(row["ended"], end) - max(row["began"], start)) for row in done)
    return sum(spans) / (actors * (end - start))


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Measure each pool on one cluster."""
    most = max(*options.actors, *options.torch)
    port, agent, client = free_ports(3)
    head = ray_start(
        *(
            "--head",
            f"--num-cpus={most}",
            f"--num-gpus={most}",
            f"--port={port}",
            f"--temp-dir={SCRATCH}/ray",
        ),
        *("--include-dashboard=false", f"--dashboard-agent-listen-port={agent}"),
        f"--ray-client-server-port={client}",
    )
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        sizes = [(actors, False) for actors in options.actors] + [(actors, True) for actors in options.torch]
        for actors, imports in sizes:
            row = pool(actors, options.seconds, options.units, imports)
            print(" | ".join(row), flush=True)
            yield row
    finally:
        kill_session(head)


def main() -> None:
    """Measure and write the result."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 8, 24, 96])
    parser.add_argument("--torch", type=int, nargs="*", default=[8, 24], help="pools whose actors import it")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a unit")
    parser.add_argument("--units", type=int, default=3, help="for each actor")
    options = parser.parse_args()
    found = list(rows(options))
    date = datetime.now(UTC).date()
    bare, torch = (" ".join(map(str, sizes)) for sizes in (options.actors, options.torch))
    each = f"{options.units} units of {options.seconds:g} s"
    columns = "actors | first unit | last birth | birth costs | busy | from 60 s | after births | driver GiB"
    command = f"--actors {bare} --torch {torch} --seconds {options.seconds:g} --units {options.units}"
    lines = [
        f"# Pools of sleeping actors, {date}",
        "",
        f"{machine('ray')}. `python benchmarks/sleeping_actors.py {command}`: {each} for each actor.",
        "",
        "An actor is born when it takes its first unit, in seconds since the pass began; its birth costs "
        "seconds of a processor, of its own process. Busy: the share of the actors' time in units, of the "
        "whole pass, from the second minute on, and from the last birth on, both until the first actor has "
        "no more work.",
        "",
        f"| {columns} |",
        f"|{'---|' * 8}",
        *(f"| {' | '.join(row)} |" for row in found),
    ]
    (RESULTS / f"sleeping_actors_{date}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
