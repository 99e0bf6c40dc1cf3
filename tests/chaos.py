"""Kill the processes of a running pipeline at random, and compare what it publishes with an undisturbed run.

    python -m tests.chaos --kills 50 --seed 0 --out benchmarks/results/chaos_DATE.md

runs the digits pipeline again and again on a cluster of two nodes on this machine, until so many processes
were killed: actors, reading tasks, training workers, raylets, the head, the driver. After each run every
published payload must be that of the undisturbed run, none missing and none twice.
tests/cluster/test_chaos.py is its short form.
"""

import argparse
import contextlib
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpt_ray.engine.code_version import code_version
from dpt_ray.store.artifact import Store
from tests.helpers.nodes import QUICK, Nodes, titled
from tests.helpers.processes import kill_group, kill_session
from tests.helpers.tiny_run import TINY, TinyRun

# Threads are fixed: undisturbed and disturbed runs share the CPUs differently.
SETTINGS = (*TINY, "compute.train_workers=1", "compute.actors=2", "compute.threads=1", "diffusion.steps=60")
NODES = 2
LONGEST_DELAY = 4.0  # seconds from the beginning of a stage to a kill in it
GIVEN_UP = 120.0  # seconds that a driver has to end after its head was killed
# Ray's own patience, shortened: a driver whose head is gone waits for it.
IMPATIENT = QUICK | {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}

# Titles of the processes that compute, by kind.
TITLES = {
    "actor": ("MapWorker",),
    "reader": ("ray::Map(", "_map_task"),
    "training worker": ("RayTrainWorker",),
}
KINDS = (*TITLES, "raylet", "head", "driver")
# The head and the driver end the attempt: they are killed less often, or nothing would ever finish.
WEIGHTS = {"head": 0.3, "driver": 0.5}


@dataclass
class Chaos:
    """A run that is disturbed: the cluster, the driver, and what was killed."""

    run: TinyRun
    rng: random.Random
    nodes: Nodes = field(default_factory=Nodes)
    killed: list[tuple[str, str]] = field(default_factory=list)  # kind, and the stage that was being made
    attempts: int = 0

    def __post_init__(self) -> None:
        store = Store(str(self.run.output))
        self.stages = {name: node.artifact(store) for name, node in self.run.nodes().items()}

    def disturb(self, kills: int) -> None:
        """Run until the report is made, starting the same command again as a user would; kill on the way.

        The stages in which something is killed are drawn before, some more than once.
        """
        plan, driver = sorted(self.rng.choices(range(len(self.stages)), k=kills)), self._start()
        while True:
            if driver.poll() is None:
                if plan and list(self.stages).index(self._stage()) >= plan[0]:
                    time.sleep(self.rng.uniform(0, LONGEST_DELAY))
                    if driver.poll() is None:
                        self._kill(driver)
                        plan.pop(0)
                time.sleep(0.1)
                continue
            _, error = driver.communicate()
            if driver.returncode == 0:
                return
            if self.attempts > 3 * kills + 3:
                raise AssertionError(f"{self.attempts} attempts, and still: {error[-2000:]}")
            driver = self._start()

    def _start(self):
        self.nodes.need(NODES)
        self.attempts += 1
        return self.run.start(**IMPATIENT, RAY_ADDRESS=self.nodes.address)

    def _kill(self, driver) -> None:
        """Kill a process of a kind of which there is one."""
        found = {kind: self._victims(kind) for kind in KINDS}
        kinds = [kind for kind in KINDS if found[kind]]
        [kind] = self.rng.choices(kinds, [WEIGHTS.get(kind, 1.0) for kind in kinds])
        self.killed.append((kind, self._stage()))
        if kind == "driver":
            kill_group(driver)
        elif kind == "head":
            self.nodes.kill()
            with contextlib.suppress(Exception):
                driver.wait(GIVEN_UP)
            if driver.poll() is None:
                kill_group(driver)
            self.nodes.start()
        else:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(self.rng.choice(found[kind]), signal.SIGKILL)
        if kind == "raylet":
            time.sleep(1)
            self._replace_lost_nodes()

    def _victims(self, kind: str) -> list[int]:
        if kind in TITLES:
            titles = TITLES[kind]
            return [pid for node in self.nodes.nodes for title in titles for pid in titled(node, title)]
        if kind == "raylet":
            return [pid for node in self.nodes.nodes for pid in titled(node, "raylet/raylet")]
        return [0]  # there always is one

    def _replace_lost_nodes(self) -> None:
        for node in [node for node in self.nodes.nodes if not titled(node, "raylet/raylet")]:
            kill_session(node)
            self.nodes.nodes.remove(node)
        self.nodes.need(NODES)

    def _stage(self) -> str:
        """The first stage of the run that is not published."""
        return next((name for name, artifact in self.stages.items() if not artifact.published), "report")


def differences(run: TinyRun, undisturbed: TinyRun) -> list[str]:
    """The artifacts whose payloads differ, or are there twice."""
    found = []
    for name in run.nodes():
        files = [shard["file"] for shard in run.artifact(name).shards().values()]
        if len(set(files)) != len(files):
            found.append(f"{name} (twice)")
        # The index has the path of the images, which are in the folder of the run.
        same = (
            indexed(run) == indexed(undisturbed)
            if name == "index"
            else run.payloads(name) == (undisturbed.payloads(name))
        )
        if not same:
            found.append(name)
    return found


def indexed(run: TinyRun) -> pa.Table:
    return pq.read_table(run.artifact("index").path("index.parquet")).drop_columns("uri")


def undisturbed_run(folder: Path) -> TinyRun:
    """A whole run on a cluster of its own that nothing happens to."""
    run = TinyRun(folder, SETTINGS)
    nodes = Nodes()
    try:
        nodes.need(NODES)
        code, _, error = run.finish(**IMPATIENT, RAY_ADDRESS=nodes.address)
        assert code == 0, error
    finally:
        nodes.kill()
        shutil.rmtree(nodes.scratch, ignore_errors=True)
    return run


def disturbed(folder: Path, seed: int, kills: int) -> Chaos:
    """A whole run of which so many processes were killed at random."""
    chaos = Chaos(TinyRun(folder, SETTINGS), random.Random(seed))
    try:
        chaos.disturb(kills)
    finally:
        chaos.nodes.kill()
        shutil.rmtree(chaos.nodes.scratch, ignore_errors=True)
    return chaos


def main() -> None:
    """Disturb runs until enough was killed; write the table, and fail at the first difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--each", type=int, default=10, help="in one run, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    options = parser.parse_args()
    began, killed, rows = time.monotonic(), Counter(), []
    with tempfile.TemporaryDirectory(prefix="dpt_ray-chaos-") as folder:
        expected = undisturbed_run(Path(folder, "undisturbed"))
        seed = options.seed
        while killed.total() < options.kills:
            chaos = disturbed(
                Path(folder, str(seed)), seed, min(options.each, options.kills - killed.total())
            )
            killed.update(kind for kind, _ in chaos.killed)
            wrong = differences(chaos.run, expected)
            rows.append((seed, chaos.attempts, chaos.killed, wrong))
            print(
                f"seed {seed}: {len(chaos.killed)} kills, {chaos.attempts} attempts, different: {wrong}",
                flush=True,
            )
            seed += 1
    options.out.write_text(page(options, rows, killed, time.monotonic() - began))
    sys.exit(any(wrong for *_, wrong in rows))


def page(options, rows, killed, seconds) -> str:
    """The result as Markdown."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(killed.items()))
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {seconds / 60:.0f} min"
    command = f"python -m tests.chaos --kills {options.kills} --each {options.each} --seed {options.seed}"
    lines = [
        f"# {killed.total()} kills of the digits pipeline",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, code {code_version()}, {machine}.",
        "",
        f"`{command} --out OUT`. "
        "A head and two raylets of one CPU on one machine; SIGKILL in stages drawn at random, up to "
        f"{LONGEST_DELAY:g} s after their beginning: {kinds}. After each run every published payload is "
        "compared with that of an undisturbed run.",
        "",
        "| seed | started | killed, amid which stage | payloads that differ |",
        "|---|---|---|---|",
    ]
    for seed, attempts, kills, wrong in rows:
        told = "; ".join(f"{kind} ({stage})" for kind, stage in kills)
        lines.append(f"| {seed} | {attempts} times | {told} | {', '.join(wrong) or 'none'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
