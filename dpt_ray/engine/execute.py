"""Execute the missing nodes of a run: step by step, each published atomically, none made twice."""

from __future__ import annotations

import platform
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from graphlib import CycleError, TopologicalSorter
from threading import Lock, main_thread

from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import Settings
from dpt_ray.config.sections import Compute
from dpt_ray.engine.allowance import UNLIMITED
from dpt_ray.engine.code_version import code_version
from dpt_ray.engine.errors import StageError, in_one_line
from dpt_ray.engine.node import Node, Task, needed
from dpt_ray.engine.progress import Display, Report
from dpt_ray.engine.spending import Spending
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.store.lease import LIFETIME, Lease
from dpt_ray.store.records import Facts, Manifest

# Called with a published artifact before any later step starts; raises ConfigError.
Check = Callable[[Artifact], None]


@dataclass(frozen=True)
class Step:
    """The nodes that one pass over the data makes together; usually one."""

    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """The displayed name."""
        return self.nodes[0].group or self.nodes[0].name


@dataclass
class Outcome:
    """When a run started, the names of the nodes that it made, and of those it found published."""

    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    made: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)


def steps(targets: Sequence[Node]) -> list[Step]:
    """Return the steps that make the targets, inputs first; the nodes of a group are one step."""
    nodes = needed(targets)
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.group or node.name, []).append(node)
    step_of = {node: name for name, members in groups.items() for node in members}
    graph = {
        name: {step_of[source] for node in members for source in node.inputs.values()}
        for name, members in groups.items()
    }
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        names = sorted(set(error.args[1]))
        raise ValueError(f"the groups {names} depend on each other") from error
    # Among the steps that are ready the first in the flow: labels are checked before any training.
    order: list[Step] = []
    ready: set[str] = set()
    position = list(groups).index
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        first = min(ready, key=position)
        ready.remove(first)
        sorter.done(first)
        order.append(Step(tuple(groups[first])))
    return order


def execute(
    targets: Sequence[Node],
    store: Store,
    compute: Compute,
    display: Display,
    checks: Mapping[str, Sequence[Check]],
    room: Callable[[Node], float] = lambda node: 0.0,
    left: Callable[[Sequence[Node]], float | None] = lambda nodes: None,
    spending: Spending | None = None,
) -> Outcome:
    """Publish the targets and everything they need. Raises StageError naming the stage that failed.

    `checks`, by node name, are called with the artifact before any later step starts. Before a node is
    made, `room(node)` bytes must be free on the disk of a local store. `left(nodes)` is the expected seconds
    of nodes, None where they are not known: told before the first long stage, and after each. `spending`
    records the GPU hours and ends the run at its cap.
    """
    outcome, plan = Outcome(), steps(targets)
    to_do = [node for step in plan for node in step.nodes if not node.artifact(store).published]
    for number, step in enumerate(plan, 1):
        missing = [node for node in step.nodes if not node.artifact(store).published]
        outcome.reused += [node.name for node in step.nodes if node not in missing]
        if not missing:
            display.reused(number, len(plan), step.name)
            _check(step, store, checks)
            continue
        display.expect(left(to_do))
        to_do = [node for node in to_do if node not in step.nodes]
        remaining = partial(left, to_do)
        with (
            display.step(number, len(plan), step.name, remaining) as progress,
            _only_writer(step.name, [node.artifact(store) for node in missing], display.waiting),
        ):
            missing = [node for node in missing if not node.artifact(store).published]
            if missing:
                _check_room(step.name, missing, store, room)
                _make(Step(tuple(missing)), store, compute, outcome, progress, spending)
        outcome.made += [node.name for node in missing]
        _check(step, store, checks)
    return outcome


@contextmanager
def _only_writer(name: str, artifacts: Sequence[Artifact], on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the leases of artifacts; end the work, as Ctrl-C does, where another process takes one over."""
    taken_by: list[str] = []
    first = Lock()  # of several leases lost at once; a second Ctrl-C would end the process on the spot

    def give_up(holder: str) -> None:
        if first.acquire(blocking=False):
            taken_by.append(holder)
            signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)

    try:
        with ExitStack() as leases:
            for artifact in sorted(artifacts, key=lambda found: found.uri):  # a fixed order avoids deadlocks
                leases.enter_context(Lease(artifact, on_wait, give_up))
            yield
    except KeyboardInterrupt:
        if not taken_by:
            raise
        raise StageError(
            f"{name}: {taken_by[0]} has taken this over, since this process did not renew its lease for "
            f"{LIFETIME:g} s (the machine was suspended, or the storage away); it goes on there"
        ) from None


def _check(step: Step, store: Store, checks: Mapping[str, Sequence[Check]]) -> None:
    for node in step.nodes:
        for check in checks.get(node.name, ()):
            check(node.artifact(store))


def _check_room(name: str, nodes: Sequence[Node], store: Store, room: Callable[[Node], float]) -> None:
    try:
        nodes[0].artifact(store).check_room(sum(room(node) for node in nodes))
    except ValueError as error:
        raise StageError(f"{name}: {error}") from error


def _make(
    step: Step, store: Store, compute: Compute, outcome: Outcome, progress: Report, spending: Spending | None
) -> None:
    stage, names = step.nodes[0].stage, [f"{node.artifact_name}/{node.reference}" for node in step.nodes]
    code_version()  # cached now: the checkout may be edited while the stage runs
    started, clock = datetime.now(UTC), time.perf_counter()
    counted = spending.counting(step.name, stage, names) if spending else nullcontext(UNLIMITED)
    try:
        with counted as allowance:
            tasks = [
                Task(
                    node,
                    node.settings,
                    node.artifact(store),
                    {key: source.artifact(store) for key, source in node.inputs.items()},
                    compute,
                    outcome.started,
                    allowance.checking(progress),
                    allowance,
                    frozenset(outcome.made),
                )
                for node in step.nodes
            ]
            facts = stage.make_together(tasks)
        seconds = time.perf_counter() - clock
        for task, name, fact in zip(tasks, names, facts, strict=True):
            hours = spending.hours_of(name) if spending else 0.0
            task.out.publish(_manifest(task, fact, started, seconds, hours))
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise StageError(f"{step.name}: {in_one_line(error)}") from error


def _manifest(
    task: Task[Settings], facts: Facts, started: datetime, seconds: float, gpu_hours: float
) -> Manifest:
    node = task.node
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: Manifest = {
        "stage": node.artifact_name,
        "name": node.name,
        "identity": node.reference,
        "version": node.version,
        "settings": dict(node.hashed),
        "unhashed": dict(node.unhashed),
        "inputs": node.references,
        "compute": task.compute.model_dump(mode="json"),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "code": code_version(),
        "host": platform.node(),
        "driver_peak_memory_bytes": peak,
        **facts,
    }
    return {**found, "gpu_hours": round(gpu_hours, 4)} if gpu_hours else found
