"""A run as a Ray job: submitted under its name and attempt, waited for, its log followed."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import dpt_ray
from dpt_ray.cluster.ray_internals import (
    JOB_STOP_SIGNAL,
    id_is_taken,
    job_is_unknown,
    quiet_uploads,
    set_switches,
)
from dpt_ray.config import ConfigError
from dpt_ray.engine.errors import StageError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL = 2.0  # seconds between two looks at a job
PATIENCE = 300.0  # seconds without an answer from the job server until following is given up

# What a job never needs of the folder that it is submitted from, as .gitignore writes it; what that file
# and .rayignore name stays behind as well.
EXCLUDES = (
    ".git/",
    "/outputs/",
    "/dpt_ray_outputs/",
    ".venv/",
    "venv/",
    "__pycache__/",
    "*.egg-info/",
    ".*_cache/",
    "node_modules/",
)

STOPPED = 143  # the exit code of a stopped job: 128 + SIGTERM


@dataclass(frozen=True)
class Job:
    """A submitted run: its submission id, and whether it ran before it was asked for again."""

    id: str
    joined: bool


def connect_jobs() -> JobSubmissionClient:
    """Return a client of the job server in RAY_API_SERVER_ADDRESS, else in RAY_ADDRESS.

    Raises ConfigError where no job server answers, or the token is refused.
    """
    set_switches()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    quiet_uploads()
    try:
        return JobSubmissionClient()
    except AuthenticationError as error:
        raise ConfigError(f"submit: {_line(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
        raise ConfigError(
            f"submit: no job server answers ({_line(error)}); set RAY_API_SERVER_ADDRESS to the dashboard of "
            "the cluster, such as http://127.0.0.1:8265 behind `ray dashboard cluster.yaml`"
        ) from error


def submit(
    client: JobSubmissionClient,
    run: str,
    command: Sequence[str],
    metadata: Mapping[str, str],
    folder: Path,
) -> Job:
    """Submit `command`, to be run in a copy of `folder`; return the job.

    The submission id is the run's name and the attempt: the first that the server has not had. A job of
    this run that has not ended is joined if its metadata are the same. Raises ConfigError if they are not,
    or if the job is refused.
    """
    environment = runtime_environment(folder)
    attempt = 1
    while True:
        job = f"{run}-{attempt}"
        try:
            client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=job,
                runtime_env=environment,
                metadata={**metadata, "attempt": str(attempt)},
            )
            return Job(job, joined=False)
        except (OSError, RuntimeError, ValueError) as error:
            # Whatever else fails may have been accepted, and must not be started twice.
            if not id_is_taken(error, job):
                raise ConfigError(f"submit: {job} was not accepted: {_reason(error)}") from error
        details = client.get_job_info(job)
        if not details.status.is_terminal():
            return _joined(details, job, metadata)
        attempt += 1


def _joined(details: JobDetails, job: str, metadata: Mapping[str, str]) -> Job:
    had = details.metadata or {}
    other = next((key for key, value in metadata.items() if had.get(key) != value), None)
    if other is None:
        return Job(job, joined=True)
    raise ConfigError(
        f"submit: job {job} of this run has not ended, and its {other} is {had.get(other)!r}, not "
        f"{metadata[other]!r}; wait for it, stop it (`ray job stop {job}`), or give this run another name=..."
    )


def runtime_environment(folder: Path) -> dict[str, object]:
    """Return the runtime environment of a job: a copy of `folder`, and this package where it is elsewhere.

    The nodes have the dependencies. A stopped job gets what Ctrl-C sends, and shuts down in order.
    """
    environment: dict[str, object] = {
        "working_dir": str(folder),
        "excludes": [*EXCLUDES],
        "env_vars": {**JOB_STOP_SIGNAL},
    }
    package = Path(dpt_ray.__file__).parent
    if package.parent != folder:
        environment["py_modules"] = [str(package)]
    return environment


def wait(client: JobSubmissionClient, job: str, log: Callable[[str], None] | None = None) -> int:
    """Wait for a job to end, passing new text of its log to `log`; return the exit code of its command.

    Raises StageError where the server does not know the job any more, or gave no answer for PATIENCE
    seconds since its last one.
    """
    from ray.exceptions import AuthenticationError

    shown, answered = 0, time.monotonic()
    while True:
        asked = time.monotonic()
        try:
            details = client.get_job_info(job)
            if log:
                text = client.get_job_logs(job)  # after the status: an ended job has written all of it
                log(text[shown:])
                shown = max(shown, len(text))
            if details.status.is_terminal():
                return exit_code(details)
            answered = time.monotonic()
        except AuthenticationError as error:
            raise StageError(f"job {job}: {_line(error)}") from error
        except (OSError, RuntimeError) as error:
            if job_is_unknown(error):
                raise StageError(
                    f"job {job}: the cluster does not know it any more; was it restarted?"
                ) from error
            if time.monotonic() - answered > PATIENCE:
                raise StageError(
                    f"job {job}: no answer for {PATIENCE:.0f} s ({_line(error)}); it may still be running"
                ) from error
        # A log that takes long to fetch is fetched less often.
        time.sleep(max(POLL, 10 * (time.monotonic() - asked)))


def exit_code(details: JobDetails) -> int:
    """Return the exit code of an ended job's command, as a shell tells it: 128 + the signal that ended it."""
    from ray.job_submission import JobStatus

    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED
    code = details.driver_exit_code or 1  # None: the command did not start
    return code if code > 0 else 128 - code


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _reason(error: Exception) -> str:
    """Return the last line of the server's traceback; what is too large comes with the remedy."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip(" .")]
    reason = lines[-1][:300] if lines else type(error).__name__
    if re.search(r"exceeds? the maximum size|too large", str(error)):
        return f"{reason}; keep images out of this folder, or name them in a .rayignore"
    return reason
