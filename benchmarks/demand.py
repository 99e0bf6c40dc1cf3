"""Seconds from the demand of a pool to its first work, on a cluster that has no node for it yet.

    python benchmarks/demand.py [--actors 1 8 64] [--gpus 8]

A head without CPUs runs Ray's own autoscaler, whose provider starts raylets on this machine, each with as
many pretended GPUs. A machine of a cloud takes minutes to boot; here a node is there within seconds, so that
what is measured is the demand, the autoscaler's decision, the raylets and the births of the actors, all on
the cores of this machine. Each pool has a cluster of its own. An actor sleeps for its units.
Writes benchmarks/results/demand_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common import write_result

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers.autoscaling import autoscaling_cluster

PROGRAM = """
import json, os, sys, time

from dpt_ray.cluster.session import connect
from dpt_ray.cluster.units import stream_units
from dpt_ray.config.sections import Compute

actors = int(sys.argv[1])
compute = Compute(actors=actors, actor_gpus=1.0, actor_cpus=0.5, autoscaling=True)


class Sleep:
    def __call__(self, unit):
        began = time.time()
        time.sleep(10)
        return {"actor": os.getpid(), "began": began}


connect(compute)
asked = time.time()
first, nodes = {}, 0
for row in stream_units([{"shard": str(n)} for n in range(3 * actors)], None, Sleep, {}, compute):
    first[row["actor"]] = min(row["began"], first.get(row["actor"], row["began"]))
births = sorted(at - asked for at in first.values())
print(json.dumps({"births": births}))
"""


def pool(actors: int, gpus: int) -> str:
    """The row of a pool."""
    nodes = -(-actors // gpus)
    with autoscaling_cluster({"CPU": gpus, "GPU": gpus}, most=nodes, idle_minutes=5) as cluster:
        done = cluster.drive(PROGRAM, str(actors))
        if done.returncode:
            raise RuntimeError(done.stderr)
        births = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"births')))
        requests = sum(line.startswith("Adding") for line in cluster.decisions())
    found = births["births"]
    half = found[len(found) // 2]
    return (
        f"| {actors} | {nodes} | {requests} | {found[0]:.1f} | {half:.1f} | {found[-1]:.1f} | {len(found)} |"
    )


def main() -> None:
    """Measure and write the result."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    options = parser.parse_args()
    lines = []
    for actors in options.actors:
        lines.append(pool(actors, options.gpus))
        print(lines[-1], flush=True)
    told = f"--actors {' '.join(map(str, options.actors))} --gpus {options.gpus}"
    how = (
        f"`python benchmarks/demand.py {told}`. Ray's autoscaler v2 looks every second (5 by default) and "
        "starts raylets on this machine. Seconds since the pass began; an actor works when it takes its "
        "first unit."
    )
    asked, works = ("actors", "nodes", "requests for nodes"), ("first", "half of them", "last")
    columns = (*asked, *(f"{which} at work" for which in works), "worked")
    write_result("demand", "From demand to work", how, columns, lines, ["ray"])


if __name__ == "__main__":
    main()
