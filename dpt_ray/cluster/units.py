"""Work units streamed through Ray Data, by tasks or by a pool of actors; their start-up time and memory."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from dpt_ray.cluster.ray_internals import failed_at_birth, lost_processes
from dpt_ray.cluster.resources import READER_SHARE, beside_actors, memory_of_fit
from dpt_ray.cluster.session import connect, readers, threads
from dpt_ray.config.sections import Compute
from dpt_ray.engine.errors import StageError
from dpt_ray.engine.progress import Report
from dpt_ray.store.records import Facts
from dpt_ray.store.transient import is_transient

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy, Dataset


class Named(TypedDict):
    """A work unit has the name of the shard that is made from it."""

    shard: str


class Result(TypedDict):
    """What a task or an actor returns for a unit: how many images it had, and how many of them are bad."""

    seconds: float
    peak_memory_bytes: int
    reader_peak_memory_bytes: NotRequired[int]
    images: int
    bad: NotRequired[int]


# How often a unit is tried while its errors are such that pass, and the random seconds between: at most 2, 4,
# 8, 16, 32 and 32, so that not all units come back at the same time.
ATTEMPTS, PAUSES = 7, wait_random_exponential(multiplier=2, max=32)

# Units beyond so many come to Ray Data in blocks of PER_BLOCK, which tasks split: a unit that is a block from
# the start takes the driver a millisecond and 8 KB before any work begins.
AT_ONCE, PER_BLOCK = 4096, 256

# How many processes a unit may lose, those of machines that were taken away among them.
DEATHS = 10
# After so many of them its images are decoded apart, so that the one that crashes its decoder is found.
SUSPECT = 2

U = TypeVar("U")  # a work unit: a row of Ray Data
D = TypeVar("D")  # the input of an actor: the decoded unit, or the unit itself
R = TypeVar("R")
Self = TypeVar("Self")
UnitT = TypeVar("UnitT", bound=Named)
ResultT = TypeVar("ResultT", bound=Result)


def run_tasks(
    units: Sequence[U],
    work: Callable[[int], Callable[[U], Result]],
    compute: Compute,
    progress: Report,
    images: int,
    *,
    name: str = "",
    held: int = 0,
) -> Facts:
    """Run `work(threads)(unit)` on every unit in light tasks; return start-up time and memory peaks.

    `images` is the number of images of all units, of which progress tells how many are done. `held` are the
    bytes that each task of the stage `name` holds whatever its unit is: it asks for so much memory, and for
    the GPU of an actor where actors have one. Ray shows a task that asks for none all GPUs of its node.
    """
    started = time.perf_counter()
    connect(compute)

    do = work(threads(compute, readers(compute)))
    asked: dict[str, float] = {"num_cpus": READER_SHARE}
    if held:
        asked["memory"] = memory_of_fit(compute, held, name)
        if compute.actor_gpus:
            asked |= {"num_cpus": compute.actor_cpus, "num_gpus": compute.actor_gpus}
    light = _light(compute, len(units), asked)
    data = _one_a_block(units, compute, light).map(do, **light, max_retries=DEATHS)
    with deaths_told():
        return _follow(data.iter_rows(), images, progress, started)


def run_actors(
    units: Sequence[U],
    actor: Callable[..., Callable[[D], ResultT]],
    arguments: Callable[[int], Mapping[str, object]],
    compute: Compute,
    progress: Report,
    images: int,
    read: Callable[[U], D] | None = None,
    count: Callable[[ResultT], None] = lambda result: None,
) -> Facts:
    """Run every unit through a pool of actors; return start-up time and memory peaks.

    `read(unit)`, if given, runs first as a task (decoding, on any CPU); its result goes to
    `actor(**arguments(threads))(unit)`, which returns a `Result`. `count(result)` may raise to end the
    pass. `images` is the number of images of all units, of which progress tells how many are done.
    """
    started = time.perf_counter()
    connect(compute)
    given = arguments(threads(compute, compute.actors))

    def counted() -> Iterator[ResultT]:
        for result in stream_units(units, read, actor, given, compute):
            count(result)
            yield result

    return _follow(counted(), images, progress, started)


def stream_units(
    units: Sequence[U],
    read: Callable[[U], D] | None,
    actor: Callable[..., Callable[[D], R]],
    arguments: Mapping[str, object],
    compute: Compute,
) -> Iterator[R]:
    """Yield the result of each unit.

    A unit is one row and one block of Ray Data, so the batches do not depend on which actor was free, and
    a task holds one unit at most.
    Actors that die are restarted and their unit is repeated, DEATHS times; an exception ends the run. An
    actor is called for two units concurrently: it computes one (under its own lock) while the other is
    fetched or published, so that a GPU does not wait for storage.
    """
    light = _light(compute, len(units), beside_actors())
    data = _one_a_block(units, compute, light)
    if read is not None:
        data = data.map(read, **light, max_retries=DEATHS)
    data = data.map(
        actor,
        fn_constructor_kwargs=dict(arguments),
        compute=_pool(len(units), compute),
        num_cpus=compute.actor_cpus,
        num_gpus=compute.actor_gpus or None,
        max_task_retries=DEATHS,
    )
    with deaths_told():
        yield from data.iter_rows()


def _one_a_block(units: Sequence[U], compute: Compute, light: Mapping[str, Any]) -> Dataset:
    """Return the units as rows, each a block of its own; `light` are the options of tasks that split blocks.

    `repartition` would do it in tasks of one CPU each, which actors that hold all of them wait for.
    """
    import ray.data

    if len(units) <= AT_ONCE:
        return ray.data.from_items(list(units), override_num_blocks=len(units))
    # As text, since a block would give all its rows the keys of each.
    texts = [json.dumps(unit) for unit in units]
    blocks = [{"units": texts[first : first + PER_BLOCK]} for first in range(0, len(texts), PER_BLOCK)]
    data = ray.data.from_items(blocks, override_num_blocks=len(blocks))
    data.context.target_max_block_size = 1  # byte: a task ends the block that it returns with each row
    return data.flat_map(_units_of, **_light(compute, len(blocks), light))


def _units_of(block: Mapping[str, list[str]]) -> list[Any]:
    return [json.loads(text) for text in block["units"]]


@contextmanager
def deaths_told() -> Iterator[None]:
    """Turn the end of a unit that lost too many processes into a StageError of one line."""
    from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError

    try:
        yield
    except (OutOfMemoryError, RayActorError, WorkerCrashedError) as error:
        if failed_at_birth(error):
            raise
        raise StageError(_too_many(DEATHS + 1)) from error


def check_deaths(where: str = "") -> None:
    """Raise StageError where the present task has lost DEATHS processes.

    Ray itself repeats for ever what its memory monitor kills.
    """
    if (deaths := lost_processes()) >= DEATHS:
        raise StageError(where + _too_many(deaths))


def _too_many(deaths: int) -> str:
    return (
        f"{deaths} processes ended while they worked on it: a crash in the code of a model, or too little "
        "memory on the node; the log of the node's raylet says which"
    )


def suspect() -> bool:
    """Return whether the present unit's images may be what ended its earlier processes."""
    return lost_processes() >= SUSPECT


def _pool(units: int, compute: Compute) -> ActorPoolStrategy:
    """Return the pool of a stage: all its actors are asked for in one request, and those work that run.

    A pool that grows asks an autoscaling cluster for one node, waits for it to boot, and then for the next,
    and it is slow to use what is free already. Ray Data does not wait for the actors of a fixed pool: one
    without room yet is the demand that an autoscaler sees, and it starts where a node joins or another run
    ends.
    """
    import ray.data

    actors = min(units, compute.actors)
    # Two units are sent to an actor ahead only if there are two for each: else the first actors would hold
    # the units of the last.
    return ray.data.ActorPoolStrategy(
        size=actors,
        max_tasks_in_flight_per_actor=2 if units >= 2 * actors else 1,
        max_concurrent_calls_per_actor=2,
        enable_true_multi_threading=True,
    )


def _light(compute: Compute, blocks: int, resources: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of light tasks: at most `readers` at a time, on what the actors leave.

    Without a bound every fraction of a CPU starts a worker process, and each repeats the imports. Ray Data
    warns of a bound above the number of `blocks`.
    """
    import ray.data

    most = min(readers(compute), blocks)
    return {**resources, "compute": ray.data.TaskPoolStrategy(size=most)}


def _follow(results: Iterable[Result], images: int, progress: Report, started: float) -> Facts:
    """Drain results and report progress; return start-up time and memory peaks.

    `started` is the start of the stage by `time.perf_counter`; start-up is the time from it to the work on
    the first unit.
    """
    startup, peak, reader_peak, done, unreadable = 0.0, 0, 0, 0, 0
    progress(0, images, "images")
    for result in results:
        startup = startup or time.perf_counter() - started - result["seconds"]
        peak = max(peak, result["peak_memory_bytes"])
        reader_peak = max(reader_peak, result.get("reader_peak_memory_bytes", 0))
        done += result["images"]
        unreadable += result.get("bad", 0)
        progress(done, images, "images", {"unreadable": unreadable})
    facts: Facts = {"startup_seconds": round(startup, 3), "peak_memory_bytes": peak}
    return facts | {"reader_peak_memory_bytes": reader_peak} if reader_peak else facts


def unit_call(call: Callable[[Self, UnitT], R]) -> Callable[[Self, UnitT], R]:
    """Decorate a unit's `__call__`: it is repeated after errors that pass, and the last names the shard.

    Ray repeats nothing after an error, and returns nothing but the error. After a death it repeats the call
    DEATHS times, and returns an error that does not tell which it was: the last call does, and does no more.
    """

    @wraps(call)
    def repeated(self: Self, unit: UnitT) -> R:
        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            wait=PAUSES,
            stop=stop_after_attempt(ATTEMPTS),
            reraise=True,
        )
        check_deaths(f"shard {unit['shard']}: ")
        try:
            return retrying(call, self, unit)
        except Exception as error:
            raise StageError(f"shard {unit['shard']}: {type(error).__name__}: {error}") from error

    return repeated


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
