"""A function of every shard of a source, in tasks: to list one on an object store is mostly to wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from dpt_ray.cluster.resources import READER_SHARE
from dpt_ray.cluster.session import connect
from dpt_ray.cluster.units import DEATHS, check_deaths, deaths_told
from dpt_ray.config.sections import Compute
from dpt_ray.engine.progress import POLL, Report, silent

R = TypeVar("R")

AHEAD = 128  # tasks at a time, whose results the cluster holds until their turn


class InTasks:
    """Applies a function to every shard, each in a task; a `ForEach` of `data.listing`."""

    def __init__(self, compute: Compute, progress: Report = silent) -> None:
        self._compute, self._progress = compute, progress

    def __call__(self, do: Callable[[str], R], shards: Sequence[str], /) -> Iterator[R]:
        """Yield `do` of every shard in order; progress is told after each.

        A task whose process dies is repeated, DEATHS times. Errors are those of `do`. Where the caller stops,
        what has not begun is cancelled; a task that Ray is just starting may run to its end.
        """
        connect(self._compute)
        import ray
        from ray.exceptions import RayTaskError

        def once_more(shard: str) -> R:
            check_deaths()
            return do(shard)

        task = ray.remote(once_more).options(name="list shards", num_cpus=READER_SHARE, max_retries=DEATHS)
        waiting, running = iter(shards), deque[object]()
        try:
            for done in range(len(shards)):
                while len(running) < AHEAD and (shard := next(waiting, None)) is not None:
                    running.append(task.remote(shard))
                self._progress(done, len(shards), "shards")
                with deaths_told():
                    while not ray.wait([running[0]], timeout=POLL)[0]:
                        # Ends the wait where the run may spend no more.
                        self._progress(done, len(shards), "shards")
                    found: R = ray.get(running[0])
                running.popleft()
                yield found
        except RayTaskError as error:
            raise error.cause from error
        finally:
            for left in running:
                ray.cancel(left, force=True)
