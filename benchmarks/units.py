"""How many units a second go through Ray Data and the driver when nothing works on them.

    python benchmarks/units.py [--units 2000 20000]

Units without work go through `cluster.units` as those of every stage do: to actors alone (sampling), and
first through a reading task (extraction), whose result of 3 MB the actor receives. Driver, tasks and two
actors share this machine. Rates are those after the first 200 units; start-up is the time to those.
Writes benchmarks/results/units_DATE.md.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import write_result

from dpt_ray.cluster.session import connect
from dpt_ray.cluster.units import stream_units
from dpt_ray.config.sections import Compute

SKIPPED = 200
Unit = dict[str, Any]


class Idle:
    """An actor that does nothing."""

    def __call__(self, unit: Unit) -> Unit:
        """Return that an image is done."""
        return {"images": 1}


def decoded(unit: Unit) -> Unit:
    """A unit with 3 MB of pixels."""
    return {**unit, "pixels": np.zeros((256, 64, 64, 3), np.uint8)}


def main() -> None:
    """Measure and write the result."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--units", type=int, nargs="+", default=[2000, 20_000])
    options = parser.parse_args()
    compute = Compute(actors=2)
    connect(compute)
    readers: dict[str, Callable[[Unit], Unit] | None] = {"actors": None, "reading tasks and actors": decoded}
    lines = []
    for count in options.units:
        units: list[Unit] = [{"shard": f"train-{n:06d}", "unit": {"rows": 256}} for n in range(count)]
        for name, read in readers.items():
            started, since = time.perf_counter(), 0.0
            for number, _ in enumerate(stream_units(units, read, Idle, {}, compute), 1):
                if number == SKIPPED:
                    since = time.perf_counter()
            rate = (count - SKIPPED) / (time.perf_counter() - since)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            lines.append(f"| {name} | {count:,} | {since - started:.1f} | {rate:.0f} | {peak:.0f} |")
            print(lines[-1], flush=True)
    how = f"`python benchmarks/units.py --units {' '.join(map(str, options.units))}`."
    columns = ("through", "units", "start-up s", "units/s", "driver MiB")
    write_result("units", "Units without work", how, columns, lines, ["ray"])


if __name__ == "__main__":
    main()
