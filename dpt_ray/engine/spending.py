"""The GPU hours that a run has spent, recorded in its folder, and the cap at which it stops.

What counts is what a stage asks for: its actors or training workers with a GPU, from its start to its end,
start-up and failed attempts included. Idle nodes are not seen from here. The record is renewed every RENEWED
seconds, so that a killed run loses no more than that.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TypedDict, cast

from dpt_ray.config.sections import Compute
from dpt_ray.engine.allowance import UNLIMITED, Allowance
from dpt_ray.engine.errors import StageError
from dpt_ray.engine.node import AnyStage, RunsOn
from dpt_ray.engine.progress import repeating
from dpt_ray.store.artifact import Artifact

FOLDER = "spent"
RENEWED = 60.0


class Attempt(TypedDict):
    """One attempt at a step: its displayed name, what it makes as STAGE/IDENTITY, and what it spent."""

    step: str
    made: list[str]
    started: str
    gpus: float
    seconds: float


class Spending:
    """The attempts of a run so far, in `folder`, and what it may spend yet."""

    def __init__(self, folder: Artifact, compute: Compute) -> None:
        self._folder, self._compute = folder, compute

    @contextmanager
    def counting(self, step: str, stage: AnyStage, made: Sequence[str]) -> Iterator[Allowance]:
        """Record the block as an attempt at a step. Raises StageError where the cap is reached before it."""
        gpus = gpus_of(stage, self._compute)
        if not gpus:
            yield UNLIMITED
            return
        allowance, started = self._allowance(gpus), time.monotonic()
        attempt: Attempt = {
            "step": step,
            "made": [*made],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "gpus": gpus,
            "seconds": 0.0,
        }
        file = f"{FOLDER}/{attempt['started'].replace(':', '')}-{uuid.uuid4().hex[:8]}.json"

        def record() -> None:
            spent = round(time.monotonic() - started, 1)
            with suppress(Exception):  # each storage raises errors of its own; the next record has it all
                self._folder.write_json(file, attempt | {"seconds": spent})

        record()
        try:
            with repeating(record, RENEWED):
                yield allowance
        finally:
            record()

    def hours_of(self, made: str) -> float:
        """Return the GPU hours of all attempts at an artifact; what made several counts in equal shares."""
        return math.fsum(
            hours(attempt) / len(attempt["made"])
            for attempt in attempts(self._folder)
            if made in attempt["made"]
        )

    def _allowance(self, gpus: float) -> Allowance:
        cap = self._compute.max_gpu_hours
        if cap is None:
            return UNLIMITED
        spent = math.fsum(map(hours, attempts(self._folder)))
        if spent >= cap:
            raise StageError(
                f"this run has spent {spent:.2f} GPU hours, and compute.max_gpu_hours allows {cap:g}; "
                "raise it to continue"
            )
        error = f"compute.max_gpu_hours ({cap:g}) is spent; what was made is kept: raise it to continue"
        return Allowance(time.monotonic() + (cap - spent) * 3600 / gpus, error)


def attempts(folder: Artifact) -> list[Attempt]:
    """Return the recorded attempts of the run in a folder, in no particular order."""
    if not folder.exists(FOLDER):
        return []
    files = [path.rpartition("/")[2] for path in folder.fs.ls(folder.path(FOLDER), detail=False)]
    return [cast(Attempt, folder.read_json(f"{FOLDER}/{file}")) for file in files if file.endswith(".json")]


def hours(attempt: Attempt) -> float:
    """Return the GPU hours of an attempt."""
    return attempt["gpus"] * attempt["seconds"] / 3600


def gpus_of(stage: AnyStage, compute: Compute) -> float:
    """Return the number of GPUs that a stage asks for at most."""
    if stage.runs_on is RunsOn.ACTORS:
        return compute.actors * compute.actor_gpus
    if stage.runs_on is RunsOn.FIT:
        return compute.actor_gpus
    if stage.runs_on is RunsOn.TRIALS:
        return compute.concurrent_trials * compute.actor_gpus
    if stage.runs_on is RunsOn.WORKERS and compute.train_gpus:
        return max(1, compute.train_workers)
    if stage.runs_on is RunsOn.WORKERS and not compute.train_workers:
        return float(_driver_has_gpu())  # which trains on it
    return 0.0


def _driver_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
