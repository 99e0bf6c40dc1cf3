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
import subprocess
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
from dpt_ray.engine.node import RunsOn
from dpt_ray.store.artifact import Store
from tests.helpers.nodes import QUICK, Nodes, titled
from tests.helpers.processes import kill_group, kill_session
from tests.helpers.tiny_run import TINY, TinyRun

# Threads are fixed: undisturbed and disturbed runs share the CPUs differently.
SETTINGS = (*TINY, "compute.train_workers=1", "compute.actors=2", "compute.threads=1", "diffusion.steps=60")
NODES = 2
LONGEST_DELAY = 1.0  # seconds from the first sight of a victim to its end
GIVEN_UP = 120.0  # seconds that a driver has to end after its head was killed
# Ray's own patience, shortened: a driver whose head is gone waits for it.
IMPATIENT = QUICK | {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}

# By where a stage runs: the kind of process that computes it, and what its title contains.
COMPUTES = {
    RunsOn.WORKERS: ("training worker", "RayTrainWorker"),
    RunsOn.ACTORS: ("actor", "MapWorker"),
    RunsOn.READERS: ("task", "ray::Map("),
}
# Half of the kills are of what computes; a head's is the slowest to come back from.
OTHERS = {"raylet": 2, "driver": 2, "head": 1}


@dataclass(frozen=True)
class Kill:
    """A kill that is planned: the number of the stage that is to be made then, and the kind of process."""

    stage: int
    kind: str
    title: str = ""


@dataclass
class Chaos:
    """A run that is disturbed: the cluster, the driver, and what was killed."""

    run: TinyRun
    rng: random.Random
    nodes: Nodes = field(default_factory=Nodes)
    killed: list[tuple[str, str]] = field(default_factory=list)  # kind, and the stage that was being made
    attempts: int = 0

    def __post_init__(self) -> None:
        store, nodes = Store(str(self.run.output)), self.run.nodes()
        self.stages = {name: node.artifact(store) for name, node in nodes.items()}
        self.computing = {
            number: COMPUTES[node.stage.runs_on]
            for number, node in enumerate(nodes.values())
            if node.stage.runs_on in COMPUTES
        }

    def disturb(self, kills: int) -> None:
        """Run until the report is made, starting the same command again as a user would; kill on the way."""
        plan, driver = self._plan(kills), self._start()
        while True:
            if driver.poll() is None:
                if plan and self._kill(plan[0], driver):
                    plan.pop(0)
                time.sleep(0.05)
                continue
            _, error = driver.communicate()
            if driver.returncode == 0:
                return
            if self.attempts > 3 * kills + 3:
                raise AssertionError(f"{self.attempts} attempts, and still: {error[-2000:]}")
            driver = self._start()

    def _plan(self, kills: int) -> list[Kill]:
        """Draw the kills, in the order of the stages."""
        plan = []
        for stage in sorted(self.rng.choices(list(self.computing), k=kills)):
            if self.rng.random() < 0.5:
                plan.append(Kill(stage, *self.computing[stage]))
            else:
                [kind] = self.rng.choices(list(OTHERS), list(OTHERS.values()))
                plan.append(Kill(stage, kind))
        return plan

    def _start(self):
        self.nodes.need(NODES)
        self.attempts += 1
        return self.run.start(**IMPATIENT, RAY_ADDRESS=self.nodes.address)

    def _kill(self, kill: Kill, driver) -> bool:
        """Kill what is planned, once its stage is made and there is such a process; return whether it was.

        Where the stage is over and there was none, the driver is killed in its place.
        """
        now, kind = self._now(), kill.kind
        if now < kill.stage:
            return False
        if kind not in OTHERS and not self._pids(kill.title):
            if now == kill.stage:
                return False
            kind = "driver"
        time.sleep(self.rng.uniform(0, LONGEST_DELAY))
        if driver.poll() is not None:
            return False
        if kind not in OTHERS and not self._pids(kill.title):  # it ended meanwhile: look again
            return False
        getattr(self, f"_kill_{kind}" if kind in OTHERS else "_kill_one")(kill, driver)
        self.killed.append((kind, list(self.stages)[now]))
        return True

    def _kill_driver(self, kill: Kill, driver) -> None:
        kill_group(driver)

    def _kill_head(self, kill: Kill, driver) -> None:
        self.nodes.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(GIVEN_UP)
        if driver.poll() is None:
            kill_group(driver)
        self.nodes.start()

    def _kill_raylet(self, kill: Kill, driver) -> None:
        os.kill(self.rng.choice(self._pids("raylet/raylet")), signal.SIGKILL)
        time.sleep(1)
        self._replace_lost_nodes()

    def _kill_one(self, kill: Kill, driver) -> None:
        os.kill(self.rng.choice(self._pids(kill.title)), signal.SIGKILL)

    def _pids(self, title: str) -> list[int]:
        return [pid for node in self.nodes.nodes for pid in titled(node, title)]

    def _replace_lost_nodes(self) -> None:
        for node in [node for node in self.nodes.nodes if not titled(node, "raylet/raylet")]:
            kill_session(node)
            self.nodes.nodes.remove(node)
        self.nodes.need(NODES)

    def _now(self) -> int:
        """The number of the first stage of the run that is not published."""
        unpublished = (n for n, artifact in enumerate(self.stages.values()) if not artifact.published)
        return next(unpublished, len(self.stages) - 1)


def differences(run: TinyRun, undisturbed: TinyRun) -> list[str]:
    """The artifacts whose payloads differ, or are there twice."""
    found = []
    for name in run.nodes():
        files = [shard["file"] for shard in run.artifact(name).shards().values()]
        if len(set(files)) != len(files):
            found.append(f"{name} (twice)")
        # The index has the path of the images, which are in the folder of the run.
        if name == "index":
            same = indexed(run) == indexed(undisturbed)
        else:
            same = run.payloads(name) == undisturbed.payloads(name)
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
        "A head and two raylets of one CPU on one machine; SIGKILL in stages drawn at random, half of them "
        f"to what computes the stage, up to {LONGEST_DELAY:g} s after it is first seen: {kinds}. After each "
        "run every published payload is compared with that of an undisturbed run.",
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
