"""That Ray still has what dpt_ray/cluster/ray_internals.py uses of it without a promise."""

import inspect
import logging
import re
import tomllib
from pathlib import Path

import pytest
import ray
from ray._raylet import __file__ as core  # where the switches of the C++ core are read

from dpt_ray.cluster import ray_internals
from tests.helpers.paths import ROOT

PACKAGE = Path(ray.__file__).parent


def test_ray_is_the_version_that_all_of_it_was_tried_on():
    """Raise TRIED and the range in pyproject.toml only after `make test-all` with the new version."""
    assert ray.__version__.rpartition(".")[0] == ray_internals.TRIED
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [needs] = [need for need in needed if need.startswith("ray[")]
    major, minor = map(int, ray_internals.TRIED.split("."))
    assert needs.endswith(f"]>={major}.{minor},<{major}.{minor + 1}")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("RAY_AUTH_MODE", core),
        ("RAY_BACKEND_LOG_LEVEL", core),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "_private/accelerators/accelerator.py"),
        ("RAY_AIR_NEW_OUTPUT", "tune/experimental/output.py"),
        ("RAY_JOB_STOP_SIGNAL", "dashboard/modules/job/job_supervisor.py"),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "_private/runtime_env/constants.py"),
        ("RAY_JOB_ID", "_private/ray_constants.py"),
        (ray_internals.HEAD, "autoscaler/v2/utils.py"),
        ("raised in its creation task", "exceptions.py"),
        ("already exists. ", "dashboard/modules/job/job_manager.py"),
        ("Request failed with status code", "dashboard/modules/dashboard_sdk.py"),
        ("--autoscaling-config", "autoscaler/v2/monitor.py"),
        ("--autoscaling-config", "autoscaler/_private/monitor.py"),
        ("--gcs-address", "autoscaler/v2/monitor.py"),
    ],
)
def test_ray_still_reads_or_writes(name, where):
    assert name.encode() in (PACKAGE / where).read_bytes()


def test_every_switch_is_looked_for():
    [looked] = [mark for mark in test_ray_still_reads_or_writes.pytestmark if mark.name == "parametrize"]
    names = {name for name, _ in looked.args[1]}
    assert names >= {*ray_internals.SWITCHES, *ray_internals.JOB_STOP_SIGNAL, *ray_internals.JOB_VARIABLES}


def test_the_trainer_still_has_the_handler_that_is_left_out():
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    name = "_register_sigint_handler"
    assert name in vars(DataParallelTrainer)
    assert f"self.{name}(" in inspect.getsource(DataParallelTrainer)
    assert issubclass(ray_internals.trainer(), TorchTrainer)
    assert name in vars(ray_internals.trainer())


def test_the_levels_are_of_loggers_that_ray_uses(monkeypatch):
    import ray.data
    import ray.train
    import ray.tune  # noqa: F401

    before = {name: logging.getLogger(name).level for name in ray_internals.LOG_LEVELS}
    try:
        ray_internals.quiet()
        for name, level in ray_internals.LOG_LEVELS.items():
            assert [below for below in logging.root.manager.loggerDict if below.startswith(f"{name}.")]
            assert logging.getLogger(name).level == level
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def test_ray_is_used_privately_in_one_module_only():
    private = re.compile(rf"(?<!\w)ray(\.\w+)*\._|_register_|{'|'.join(ray_internals.SWITCHES)}")
    users = {path.name for path in (ROOT / "dpt_ray").rglob("*.py") if private.search(path.read_text())}
    assert users == {"ray_internals.py"}
