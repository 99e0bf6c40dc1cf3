"""Independent trials by Ray Tune."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from dpt_ray.cluster.resources import memory_of_fit
from dpt_ray.cluster.session import connect, startup_seconds, threads
from dpt_ray.cluster.units import DEATHS
from dpt_ray.config.hashing import Settings
from dpt_ray.engine.allowance import Allowance
from dpt_ray.engine.errors import StageError
from dpt_ray.engine.node import Task
from dpt_ray.engine.progress import POLL, REMOTE_POLL, Reached, following

if TYPE_CHECKING:
    from ray.tune import ResultGrid, Stopper

T = TypeVar("T")
S = TypeVar("S", bound=Settings)


def run_trials(
    task: Task[S],
    trials: Sequence[T],
    run_trial: Callable[[T, int], Mapping[str, float | None]],
    total: int,
    held: int,
) -> float:
    """Run every trial, each publishing a shard of the task; return the start-up time in seconds.

    `run_trial(trial, threads)` returns the metrics for Tune. `total` includes trials that are already done.
    `held` are the bytes of features that a trial's process holds: it asks for so much memory. Trials whose
    process was lost are run again, DEATHS times. Raises RuntimeError where a trial fails, and StageError
    where the task's allowance is over: what was published by then stays.
    """
    compute, out = task.compute, task.out
    started, clock = time.time(), time.monotonic()
    connect(compute)
    from ray import tune

    share = threads(compute, compute.concurrent_trials)
    memory = memory_of_fit(compute, held, task.name)
    resources = {"cpu": compute.actor_cpus, "gpu": compute.actor_gpus, "memory": memory}

    def trainable(config: dict[str, T]) -> None:
        began = time.time()
        tune.report({**run_trial(config["trial"], share), "began": began})

    def done() -> Reached:
        return Reached(len(out.shards()))

    with (
        tempfile.TemporaryDirectory(prefix="dpt_ray-tune-") as scratch,
        following(task.progress, total, "trials", done, POLL if out.is_local else REMOTE_POLL),
    ):

        def run(some: Sequence[T], name: str) -> ResultGrid:
            return tune.Tuner(
                tune.with_resources(trainable, resources),
                param_space={"trial": tune.grid_search(list(some))},
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=compute.concurrent_trials, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    name=name, storage_path=scratch, verbose=0, stop=_stopper(task.allowance)
                ),
            ).fit()

        began = _all_that_began(run, trials, task.node.digest)
    if len(began) < len(trials) and task.allowance.is_over:
        raise StageError(task.allowance.error)
    if len(began) < len(trials):  # Tune returns as usual where an interrupt ended it
        raise RuntimeError(f"{len(trials) - len(began)} trials did not end")
    return startup_seconds(min(began) - started, time.monotonic() - clock)


def _all_that_began(
    run: Callable[[Sequence[T], str], ResultGrid], trials: Sequence[T], name: str
) -> list[float]:
    """Run trials, and again those that lost their process; return when each that ended had begun."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    began: list[float] = []
    for attempt in range(DEATHS + 1):
        found = run(trials, f"{name}-{attempt}")
        began += [result.metrics["began"] for result in found if result.metrics and "began" in result.metrics]
        errors = [result.error for result in found if result.error]
        own = [error for error in errors if not isinstance(error, RayActorError | OutOfMemoryError)]
        if own or (errors and attempt == DEATHS):
            raise RuntimeError(f"{len(errors)} trials failed") from (own or errors)[0]
        if not errors:
            break
        # By place, a grid's order: a trial that died early has told Tune nothing, its `config` neither.
        trials = [trial for trial, result in zip(trials, found, strict=False) if result.error]
    return began


def _stopper(allowance: Allowance) -> Stopper:
    """Return what ends all trials where the allowance is over: Tune asks it in this process."""
    from ray.tune import Stopper

    class Over(Stopper):
        def __call__(self, trial_id: str, result: Mapping[str, object]) -> bool:
            return False

        def stop_all(self) -> bool:
            return allowance.is_over

    return Over()
