"""Trainings on a real cluster of several nodes that are killed, added and drained under them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpt_ray.cluster import training
from dpt_ray.store.checkpoints import checkpoint_names
from dpt_ray.training.log import read_log
from tests.helpers import gated_training
from tests.helpers.gated_training import STEPS, function, gate, gated_task
from tests.helpers.nodes import QUICK, Nodes
from tests.helpers.paths import ROOT
from tests.helpers.processes import kill_session


@pytest.fixture(scope="module")
def nodes():
    made = Nodes()
    yield made
    made.kill()
    shutil.rmtree(made.scratch, ignore_errors=True)


class Training:
    """A gated training in a process of its own."""

    def __init__(self, folder, nodes, **compute):
        self.folder, self.nodes, self.log = folder, nodes, Path(folder, "driver.log")
        self.compute = {"resize_seconds": 1.0, **compute}
        self.task = gated_task(folder, self.compute)

    def start(self):
        """The same command at any time."""
        script = gated_training.__file__
        self.process = subprocess.Popen(
            [sys.executable, script, str(self.folder), json.dumps(self.compute)],
            env=os.environ | QUICK | {"RAY_ADDRESS": self.nodes.address, "PYTHONPATH": str(ROOT)},
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def open(self, steps):
        """Lets the training make so many steps in all."""
        part = Path(self.folder, "part")
        part.write_text(str(steps))
        part.rename(gate(self.folder))

    def until(self, condition, seconds=150):
        """Waits, while the driver lives, until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, f"waited too long: {self.logged()}, {self.nodes.training()}"
            time.sleep(0.05)

    def logged(self):
        return read_log(self.task.out)[-1]

    def saved(self):
        names = checkpoint_names(self.task.out)
        return int(names[-1]) if names else 0

    def finish(self):
        self.open(STEPS)
        self.process.wait(200)
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        return result(self.task)

    def kill(self):
        with contextlib.suppress(AttributeError):
            kill_session(self.process)


@pytest.fixture
def begin(nodes, tmp_path):
    """Starts a training, and ends what is left of it."""
    begun = []

    def start(steps, **compute):
        begun.append(Training(tmp_path, nodes, **compute))
        begun[-1].open(steps)
        begun[-1].start()
        return begun[-1]

    yield start
    for each in begun:
        each.kill()


def result(task):
    """Weights, averages and moments of the last checkpoint, and the logged curve."""
    assert checkpoint_names(task.out)[-1] == f"{STEPS:09d}"
    tensors = load_file(task.out.path(f"checkpoints/{STEPS:09d}.safetensors"))
    curve = [[r[key] for key in ("step", "loss", "lr", "grad_norm")] for r in read_log(task.out)]
    return {key: value.tolist() for key, value in tensors.items()} | {"curve": curve}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result of the same training in this process, for one worker and, in two parts, for two."""
    import torch

    torch.set_num_threads(1)
    results = {}
    for workers in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        gate(folder).write_text(str(STEPS))
        task = gated_task(folder, {"train_workers": 0, "gradient_accumulation": workers})
        training.run(task, function(folder))
        results[workers] = result(task)
    return results


@pytest.mark.parametrize("workers", [1, 2])
def test_neither_a_killed_raylet_nor_a_killed_cluster_changes_a_bit(workers, nodes, begin, undisturbed):
    nodes.need(workers + 1)
    run = begin(13, train_workers=workers, max_failures=workers - 1)
    run.until(lambda: run.saved() == 10 and len(nodes.training()) == workers)
    [killed, *_] = nodes.training()
    nodes.kill_raylet(killed)  # its workers end with it; the spare node takes its place
    nodes.nodes.remove(killed)
    run.until(lambda: len(nodes.training()) == workers)
    run.open(28)
    run.until(lambda: run.saved() == 20)
    kill_session(killed)

    nodes.kill()
    run.kill()
    assert run.saved() == 20
    nodes.start()
    nodes.need(workers)
    run.start()
    assert run.finish() == undisturbed[workers]


def test_an_elastic_training_grows_saves_on_a_notice_and_shrinks(nodes, begin, undisturbed):
    nodes.need(1)
    run = begin(13, train_workers=2, min_train_workers=1)
    run.until(lambda: run.saved() == 10)
    nodes.need(2)
    run.until(lambda: len(nodes.training()) == 2)
    run.open(23)
    run.until(lambda: run.saved() == 20)

    leaving = nodes.training()[0]
    nodes.drain(leaving, seconds=20)
    for step in range(24, 29):  # a notice is seen at a step
        run.open(step)
        time.sleep(2)  # twice as long as Ray Train waits here before it looks again
        if run.saved() > 20:
            break
    noticed = run.saved()
    assert 20 < noticed < 29
    run.open(29)  # made by two, and lost, and made again by one
    # What the log says, and not which processes are left: those of a node that is gone may linger.
    run.until(lambda: run.logged()["workers"] == 1)
    assert run.logged()["step"] > noticed
    # Both have computed the same two halves of the batch: not a bit is another.
    assert run.finish() == undisturbed[2]
    workers = [record["workers"] for record in read_log(run.task.out)]
    assert workers[:10] == [1] * 10
    assert workers[10:noticed] == [2] * (noticed - 10)
    assert workers[-1] == 1
