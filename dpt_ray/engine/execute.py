"""Makes what is missing: one step after the other, each published whole, nothing made twice."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dpt_ray
from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute
from dpt_ray.engine.node import Node, Task, topological
from dpt_ray.engine.progress import Display, Report
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.store.lease import Lease


class StageError(RuntimeError):
    """A stage that failed: which one, and what to do."""


@dataclass(frozen=True)
class Step:
    """Nodes that one pass makes together; mostly one."""

    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """What a person reads."""
        return self.nodes[0].group or self.nodes[0].name


@dataclass
class Outcome:
    """What a run did: the nodes it made and those it found published."""

    made: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)


def steps(targets: Sequence[Node]) -> list[Step]:
    """The steps to the targets, inputs first; nodes of a group become one step."""
    nodes = topological(list(targets))
    members: dict[str, list[Node]] = {}
    for node in nodes:
        members.setdefault(node.group or node.name, []).append(node)
    order: list[Step] = []
    placed: set[int] = set()
    while members:
        for name, group in members.items():
            inputs = {id(source) for node in group for source in node.needs.values()}
            if inputs <= placed:
                order.append(Step(tuple(group)))
                placed |= {id(node) for node in group}
                del members[name]
                break
        else:
            raise ValueError(f"the groups {sorted(members)} wait for each other")
    return order


def execute(
    targets: Sequence[Node],
    store: Store,
    compute: Compute,
    display: Display,
    checks: Mapping[str, Callable[[Artifact], None]],
    needed: Callable[[Node], float] = lambda node: 0.0,
) -> Outcome:
    """Publishes the targets and all they need. Raises StageError naming the stage that failed.

    `checks` look at an artifact, by its node's name, before anything is made that comes after it.
    `needed(node)` bytes must be free, where the store is on this machine, before a node is made.
    """
    outcome, plan = Outcome(), steps(targets)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for number, step in enumerate(plan, 1):
        missing = [node for node in step.nodes if not node.artifact(store).published]
        outcome.reused += [node.name for node in step.nodes if node not in missing]
        if not missing:
            display.reused(number, len(plan), step.name)
            _check(step, store, checks)
            continue
        with display.step(number, len(plan), step.name) as progress, ExitStack() as leases:
            for node in sorted(missing, key=lambda node: node.digest):  # one order: no deadlock
                leases.enter_context(Lease(node.artifact(store), display.waiting))
            missing = [node for node in missing if not node.artifact(store).published]
            if missing:
                _check_room(step.name, missing, store, needed)
                _make(Step(tuple(missing)), store, compute, now, progress)
        outcome.made += [node.name for node in missing]
        _check(step, store, checks)
    return outcome


def _check(step: Step, store: Store, checks: Mapping[str, Callable[[Artifact], None]]) -> None:
    for node in step.nodes:
        if node.name in checks:
            checks[node.name](node.artifact(store))


def _check_room(name: str, nodes: Sequence[Node], store: Store, needed: Callable[[Node], float]) -> None:
    try:
        nodes[0].artifact(store).check_room(sum(needed(node) for node in nodes))
    except ValueError as error:
        raise StageError(f"{name}: {error}") from error


def _make(step: Step, store: Store, compute: Compute, run_started: str, progress: Report) -> None:
    tasks = [
        Task(
            node,
            node.artifact(store),
            {key: source.artifact(store) for key, source in node.needs.items()},
            compute,
            run_started,
            progress,
        )
        for node in step.nodes
    ]
    maker = importlib.import_module(f"dpt_ray.stages.{step.nodes[0].maker}")
    code_version()  # what is run, and not what may be edited meanwhile
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        facts = maker.make_together(tasks) if step.nodes[0].group else [maker.make(tasks[0])]
        seconds = time.perf_counter() - clock
        for task, fact in zip(tasks, facts, strict=True):
            task.out.publish(_manifest(task, fact, started, seconds))
    except (ConfigError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise StageError(f"{step.name}: {_in_one_line(error)}") from error


def _manifest(task: Task, facts: Mapping[str, Any], started: datetime, seconds: float) -> dict[str, Any]:
    node = task.node
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "stage": node.stage,
        "name": node.name,
        "identity": node.reference,
        "version": node.version,
        "settings": dict(node.settings),
        "unhashed": dict(node.unhashed),
        "inputs": {key: f"{source.stage}/{source.reference}" for key, source in node.inputs.items()},
        "compute": task.compute.model_dump(mode="json"),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "code": code_version(),
        "host": platform.node(),
        "driver_peak_memory_bytes": peak,
        **facts,
    }


@cache
def code_version() -> str:
    """The git commit of the package's checkout, or its version where there is none; as of the first call."""
    checkout = Path(dpt_ray.__file__).resolve().parents[1]
    # An installed package may lie inside of somebody else's repository.
    ours = _git(checkout, "rev-parse", "--show-toplevel") == str(checkout)
    return (ours and _git(checkout, "describe", "--always", "--dirty")) or version("dpt_ray")


def _git(folder: Path, *arguments: str) -> str:
    """What git says; "" where it fails, or is not there."""
    try:
        shown = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except OSError:
        return ""
    return "" if shown.returncode else shown.stdout.strip()


def _in_one_line(error: BaseException) -> str:
    """What went wrong below Ray's wrappers."""
    while type(error) is not StageError:  # Ray's wrapper of one is an instance of it as well
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None or not str(cause):  # Ray Data marks what is not a user's error by an empty cause
            break
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if type(error) is StageError:
        return lines[0]
    if type(error).__module__.startswith("ray."):  # the text of a remote traceback: its last line says it
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}"
