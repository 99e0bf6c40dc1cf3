"""Fits of classifiers as tasks with a GPU, which this machine pretends to have."""

import json
import os
import subprocess
import sys

import pytest

from dpt_ray.cluster.fits import run_fit
from dpt_ray.config.sections import Compute
from tests.helpers.cluster import gpu_head
from tests.helpers.paths import ROOT
from tests.helpers.processes import kill_session

DRIVER = """
import hashlib, json, logging, os, signal, sys, time
from pathlib import Path

from dpt_ray.cluster.fits import run_fit
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute
from dpt_ray.engine.errors import StageError
from dpt_ray.stages.rung import LadderRung, RungSettings
from tests.helpers.feature_store import feature_store, make, task

folder = Path(sys.argv[1])
store, made = feature_store(folder / "store")
settings = RungSettings(method="balanced_self_training", probe_l2=0.0025)
inputs = {key: made[key] for key in ("index", "features", "labels")}
gpu = {"actor_gpus": 1.0, "actor_cpus": 0.5}
told = {}


def rung(name, **compute):
    out = make(LadderRung, store, inputs, settings, name, **compute)
    return hashlib.sha256(out.local_file("model.safetensors").read_bytes()).hexdigest()


told["weights"] = [rung("here"), rung("there", **gpu)]


def toy(fit):
    return run_fit(task(LadderRung, store, inputs, settings, **gpu), fit)


def where(task):
    import ray

    logging.getLogger("dpt_ray").warning("%s: look", task.name)
    return {"pid": os.getpid(), "gpus": ray.get_gpu_ids()}


def wrong(task):
    raise ConfigError("ladder.prior: wrong")


def dies_once(task):
    mark = folder / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"survived": True}


def sleeps(task):
    time.sleep(600)


heard = []
handler = logging.Handler()
handler.emit = lambda record: heard.append(record.getMessage())
logging.getLogger("dpt_ray").addHandler(handler)
told["where"], told["pid"], told["heard"] = toy(where), os.getpid(), heard
try:
    toy(wrong)
except ConfigError as error:
    told["error"] = [type(error).__name__, str(error)]
told["again"] = toy(dies_once)


def over(done, total, what="", numbers=None):
    raise StageError("compute.max_gpu_hours (1) is spent")


from dataclasses import replace

try:
    run_fit(replace(task(LadderRung, store, inputs, settings, **gpu), progress=over), sleeps)
except StageError as error:
    told["over"] = str(error)
told["free"] = toy(where)["gpus"]  # the sleeper has left the only GPU


def memory(task):
    import ray

    return {"memory": ray.get_runtime_context().get_assigned_resources()["memory"]}


told["memory"] = run_fit(task(LadderRung, store, inputs, settings, **gpu), memory, 1 << 20)["memory"]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def one_gpu():
    """A cluster of its own whose head pretends one GPU."""
    head, address = gpu_head("gpu")
    yield address
    kill_session(head)


@pytest.fixture(scope="module")
def told(one_gpu, tmp_path_factory):
    """What a driver on that cluster tells of its fits."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path_factory.mktemp("fits"))],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": one_gpu},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fit_is_one_task_with_a_gpu_and_gives_what_the_driver_would(told):
    here, there = told["weights"]
    assert here == there
    assert told["where"]["gpus"] == [0] and told["where"]["pid"] != told["pid"]


def test_its_warnings_are_heard_and_its_errors_are_its_own(told):
    assert told["heard"] == ["it: look", "it: look"]
    assert told["error"] == ["ConfigError", "ladder.prior: wrong"]


def test_it_is_repeated_where_its_process_dies(told):
    assert told["again"]["survived"]


def test_it_asks_for_the_memory_that_it_holds(told):
    assert told["memory"] == (1 << 20) + (3 << 30)


def test_it_is_ended_where_the_run_may_spend_no_more(told):
    assert told["over"] == "compute.max_gpu_hours (1) is spent" and told["free"] == [0]


def test_without_gpus_for_actors_it_runs_in_the_driver():
    class Task:
        compute = Compute()

    assert run_fit(Task(), lambda task: {"pid": os.getpid()}) == {"pid": os.getpid()}
