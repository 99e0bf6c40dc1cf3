"""A fit of classifiers: in the driver's process, or as one task on a GPU of the cluster.

The driver of a job runs on the head, which has few CPUs and no GPU; a fit on a million rows of features
takes a GPU minutes and such a head half a day.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from dpt_ray.cluster.resources import memory_of_fit
from dpt_ray.cluster.session import connect
from dpt_ray.cluster.units import DEATHS, check_deaths, deaths_told, peak_memory
from dpt_ray.config.hashing import Settings
from dpt_ray.engine.node import Task
from dpt_ray.engine.progress import POLL, silent
from dpt_ray.store.records import Facts

LOGGER = "dpt_ray"

S = TypeVar("S", bound=Settings)
Fit = Callable[[Task[S]], Facts]


def run_fit(task: Task[S], fit: Fit[S], held: int = 0) -> Facts:
    """Return `fit(task)`, which runs where `compute.actor_gpus` says, and what it warns of is logged here.

    `held` are the bytes of features and scores that it holds: the task asks for so much memory. A task whose
    process dies is repeated, DEATHS times. Errors are those of `fit`.
    """
    if not task.compute.actor_gpus:
        return fit(task)
    connect(task.compute)
    import ray
    from ray.exceptions import RayTaskError

    compute = task.compute
    remote = ray.remote(_heard).options(
        name=task.name,
        num_cpus=compute.actor_cpus,
        num_gpus=compute.actor_gpus,
        memory=memory_of_fit(compute, held, task.name),
        max_retries=DEATHS,
    )
    running = remote.remote(fit, replace(task, progress=silent))
    try:
        with deaths_told():
            while not ray.wait([running], timeout=POLL)[0]:
                task.progress(0, 1, "fits")  # ends the wait where the run may spend no more
            facts, warnings = ray.get(running)
    except RayTaskError as error:
        raise error.cause from error
    except BaseException:  # Ctrl-C among them: the GPU is not to work for nobody
        ray.cancel(running, force=True)
        raise
    for message in warnings:
        logging.getLogger(LOGGER).warning("%s", message)
    return facts


def _heard(fit: Fit[S], task: Task[S]) -> tuple[Facts, list[str]]:
    """Return the facts of a fit and what it warned of, which a worker's log would bury."""
    check_deaths()
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    keep, logger = Keep(logging.WARNING), logging.getLogger(LOGGER)
    logger.addHandler(keep)
    try:
        return {**fit(task), "peak_memory_bytes": peak_memory()}, messages
    finally:
        logger.removeHandler(keep)
