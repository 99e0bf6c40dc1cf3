"""What this project uses of Ray beyond the interface that Ray promises to keep, all of it here.

Tried with Ray 2.60, the only version that pyproject.toml allows. Before another is allowed,
tests/cluster/test_ray_internals.py says which of these it changed, and `make test-all` what that breaks.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

TRIED = "2.60"

PROCESSES = Path("/proc")

# Environment switches that are set where nobody has set them, before ray is imported first.
SWITCHES = {
    "RAY_AUTH_MODE": "token",  # `ray start` and the command line have it off, `ray.init` has it on
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a worker without a GPU of its own sees none
    "RAY_AIR_NEW_OUTPUT": "0",  # else Tune prints a table of its own
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}

# Ray Data and Train log the traceback of an error in addition to raising it.
LOG_LEVELS = {
    "ray": logging.ERROR,
    "ray.data": logging.CRITICAL,
    "ray.train": logging.ERROR,
    "ray.tune": logging.ERROR,
}

HEAD = "node:__internal_head__"  # a resource that the head alone has

JOB_VARIABLES = ("RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR")  # one of them is set in a submitted job
JOB_STOP_SIGNAL = {"RAY_JOB_STOP_SIGNAL": "SIGINT"}  # of a job's environment: what `ray job stop` sends

DRAIN = ("drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION")  # of `ray`; a hidden command


def set_switches() -> None:
    """Set the switches that are not set."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)


def in_job() -> bool:
    """Return whether this process is the command of a submitted job."""
    return any(name in os.environ for name in JOB_VARIABLES)


def id_is_taken(refusal: Exception, job: str) -> bool:
    """Return whether the job server refused a submission because it has had this id."""
    return f"submission_id {job} already exists." in str(refusal)


def job_is_unknown(refusal: Exception) -> bool:
    """Return whether the job server knows no job of the id that it was asked for."""
    return "status code 404" in str(refusal)


def lost_processes() -> int:
    """Return how many processes ended before while they worked on the present task, or call of an actor.

    Those of lost machines are among them. 0 outside tasks and actors.
    """
    from ray._private.worker import global_worker

    if not global_worker.connected:
        return 0
    return int(global_worker.core_worker.get_current_task_attempt_number())


def failed_at_birth(error: Exception) -> bool:
    """Return whether an actor ended by an exception of its own `__init__`, whose text the error ends with."""
    return "raised in its creation task" in str(error)


def quiet() -> None:
    """Leave it to this project what is printed: no progress bars, no second traceback."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    # The limits of retries of a map of Ray Data have no names of their own, and by this one until 2.64.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else Ray wraps it and the cause is lost


def quiet_uploads() -> None:
    """Do not log what is uploaded from where; the loggers of the job client set levels of their own."""
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)


@contextmanager
def native_output_hidden() -> Iterator[None]:
    """Hide what Ray's C++ core writes to file descriptor 2; exceptions still propagate.

    It prints its log level there, and a warning about the actors of Ray Data (ray #53727).
    """
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def trainer() -> type[TorchTrainer]:
    """Return TorchTrainer without its handler of Ctrl-C, which prints nothing and stays afterwards."""
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: object) -> None:
            """Leave Ctrl-C to `dpt`."""

    return Trainer


def unserved_demand() -> list[dict[str, float]]:
    """Return the resources of the pending actors and tasks that no node type of the autoscaler has.

    The autoscaler (v2) reports them to the head, wherever it runs.
    """
    from ray._private.worker import global_worker
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(global_worker.gcs_client.get_cluster_status())
    return [dict(asked.resources_bundle) for asked in reply.autoscaling_state.infeasible_resource_requests]


def autoscaler_configuration() -> Path | None:
    """Return the file that the autoscaler of the joined cluster was started with, if it runs on this machine.

    Ray keeps it in no place that a driver can ask: it is read from the command line of the process.
    """
    import ray

    address = ray.get_runtime_context().gcs_address
    for process in PROCESSES.glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
            if options.get("--gcs-address") == address and "--autoscaling-config" in options:
                path = Path(options["--autoscaling-config"]).expanduser()
                return path if path.exists() else None
    return None
