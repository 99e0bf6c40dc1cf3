"""Stages, nodes and tasks: what a stage declares, what an artifact is made from, what a stage receives.

A stage is a class without state that declares its artifact, settings, inputs, version and where it runs.
Its `make` receives a `Task` and nothing else: it reads the artifacts that it declares as inputs, never
another stage's settings or a guessed path.

A node is one artifact of a run, as plain data. Its identity hashes the artifact's name, the stage's
version, the hashed settings and the identities of the hashed inputs. Nodes of one `group` are made
together by one pass over the data.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import Content, Settings, split
from dpt_ray.config.sections import Compute
from dpt_ray.engine.allowance import UNLIMITED, Allowance
from dpt_ray.engine.progress import Report, silent
from dpt_ray.store.artifact import Artifact, Store, identity
from dpt_ray.store.records import Facts

_numbers = itertools.count()
S = TypeVar("S", bound=Settings)
S_co = TypeVar("S_co", bound=Settings, covariant=True)


class NoSettings(Settings):
    """The settings of a stage that has none."""


class RunsOn(Enum):
    """Where a stage runs."""

    DRIVER = "the driver"
    FIT = "the driver, or a GPU"
    READERS = "reading tasks"
    ACTORS = "actors"
    WORKERS = "training workers"
    TRIALS = "trials"


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads.

    `artifacts` are the allowed kinds. `hashed_as` is the input's name in the identity, where that is older
    than the name in the code. An input that is not `hashed` does not affect the result: it is only shown,
    or another input was made from it. Of an input that is `several` there may be further ones, whose keys
    are its name, a colon and what tells them apart.
    """

    artifacts: tuple[str, ...]
    hashed_as: str = ""
    optional: bool = False
    hashed: bool = True
    several: bool = False


def one_of(
    *artifacts: str,
    hashed_as: str = "",
    optional: bool = False,
    hashed: bool = True,
    several: bool = False,
) -> Input:
    """Return an input that may be any of these artifacts."""
    return Input(artifacts, hashed_as, optional, hashed, several)


def reads(inputs: Mapping[str, Input]) -> Mapping[str, Input]:
    """Return the inputs of a stage by name, read-only."""
    return MappingProxyType(dict(inputs))


class Stage(ABC, Generic[S]):
    """How one kind of artifact is made."""

    artifact: ClassVar[str]  # also the name of the folder in the store
    settings: ClassVar[type[Settings]] = NoSettings
    inputs: ClassVar[Mapping[str, Input]] = reads({})
    runs_on: ClassVar[RunsOn] = RunsOn.DRIVER

    @classmethod
    def version(cls, settings: S) -> int:
        """Return the algorithm version; raise it when the same settings give another result."""
        return 1

    @classmethod
    @abstractmethod
    def make(cls, task: Task[S]) -> Facts:
        """Write the payload of `task.out`; return the facts for its manifest."""

    @classmethod
    def make_together(cls, tasks: Sequence[Task[S]]) -> list[Facts]:
        """Make the artifacts of a group; overridden by stages that share one pass over the data."""
        return [cls.make(task) for task in tasks]


# A stage, whatever its settings.
AnyStage = type[Stage[Any]]


@dataclass(frozen=True)
class Extent:
    """How much of a growing artifact is used; not part of that artifact's identity.

    It is part of the identity of what is made from it, unless that grows along.
    """

    images_per_class: int | None = None
    images: int | None = None

    def __str__(self) -> str:
        """Return the suffix of the manifest's name and, after "@", of the artifact's reference."""
        parts = {"k": self.images_per_class, "n": self.images}
        return "-".join(f"{letter}{count}" for letter, count in parts.items() if count)


@dataclass(frozen=True, eq=False)
class Node:
    """One artifact of a run, published or not.

    `hashed` settings affect the result; `unhashed` ones (paths of hashed files, save intervals) do not.
    `unreadable` is the one-line error of a file in the settings that cannot be read: such a node has no
    identity, and only runs that need it fail.
    """

    name: str
    stage: AnyStage
    settings: Settings
    inputs: Mapping[str, Node] = field(default_factory=dict)
    extent: Extent = Extent()
    group: str = ""
    hashed: Mapping[str, Any] = field(default_factory=dict)
    unhashed: Mapping[str, Any] = field(default_factory=dict)
    unreadable: str = ""
    number: int = field(default_factory=lambda: next(_numbers), repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        stage: AnyStage,
        settings: Settings,
        inputs: Mapping[str, Node],
        content: Content,
        *,
        extent: Extent | None = None,
        group: str = "",
    ) -> Node:
        """Return a node after checking its inputs against the declared ones.

        `content` returns the digest of a file in the settings; its ConfigError becomes `unreadable`.
        """
        _check_inputs(name, stage, inputs)
        unreadable = ""

        def readable(key: str, source: str) -> str:
            nonlocal unreadable
            try:
                return content(key, source)
            except ConfigError as error:
                unreadable = str(error)
                return ""

        hashed, unhashed = split(settings, readable)
        node_extent = extent or Extent()
        return cls(name, stage, settings, inputs, node_extent, group, hashed, unhashed, unreadable)

    @property
    def artifact_name(self) -> str:
        """The kind of the artifact."""
        return self.stage.artifact

    @property
    def version(self) -> int:
        """The version of the stage's algorithm for these settings."""
        return self.stage.version(self.settings)

    @cached_property
    def missing(self) -> str:
        """The error of the first unreadable file that this node depends on, "" where there is none."""
        found = (node.missing for node in self.inputs.values() if node.missing)
        return self.unreadable or next(found, "")

    @property
    def hashed_inputs(self) -> dict[str, Node]:
        """The hashed inputs by their names in the identity."""
        found = {}
        for key, node in self.inputs.items():
            name, colon, which = key.partition(":")
            declared = self.stage.inputs[name]
            if declared.hashed:
                found[(declared.hashed_as or name) + colon + which] = node
        return found

    @property
    def references(self) -> dict[str, str]:
        """STAGE/IDENTITY of each hashed input, as recorded in the manifest."""
        return {key: f"{node.artifact_name}/{node.reference}" for key, node in self.hashed_inputs.items()}

    @cached_property
    def digest(self) -> str:
        """The identity hash, also the folder's name in the store. Raises ConfigError for a missing file."""
        if self.missing:
            raise ConfigError(self.missing)
        # An artifact that grows along with its inputs has one identity at every extent.
        grows = self.extent != Extent()
        inputs = {key: node.digest if grows else node.reference for key, node in self.hashed_inputs.items()}
        return identity(self.artifact_name, self.version, self.hashed, inputs)

    @property
    def reference(self) -> str:
        """The identity with the extent."""
        extent = str(self.extent)
        return f"{self.digest}@{extent}" if extent else self.digest

    def artifact(self, store: Store) -> Artifact:
        """Return the artifact, published or not."""
        return store.artifact(self.artifact_name, self.digest, str(self.extent))


def _check_inputs(name: str, stage: AnyStage, inputs: Mapping[str, Node]) -> None:
    declared = stage.inputs
    for key, wanted in declared.items():
        if key not in inputs and not wanted.optional:
            raise TypeError(f"{name}: {stage.__name__} needs the input {key}")
    for key, node in inputs.items():
        first, colon, _ = key.partition(":")
        allowed = declared.get(first)
        if allowed is None or (colon and not allowed.several):
            raise TypeError(f"{name}: {stage.__name__} declares no input {key}")
        if node.artifact_name not in allowed.artifacts:
            raise TypeError(
                f"{name}: {stage.__name__}'s input {key} is {' or '.join(allowed.artifacts)}, "
                f"not {node.artifact_name}"
            )


@dataclass(frozen=True)
class Task(Generic[S_co]):
    """What a stage receives: its output, inputs and settings, how to run, and where to report progress.

    A training ends at a checkpoint when its `allowance` is over; for other work `progress` raises then.
    `made` are the names of the nodes that this run has made before.
    """

    node: Node
    settings: S_co
    out: Artifact
    inputs: Mapping[str, Artifact]
    compute: Compute
    run_started: str
    progress: Report = silent
    allowance: Allowance = UNLIMITED
    made: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name


def needed(targets: Iterable[Node]) -> list[Node]:
    """Return the targets and their dependencies, each once, inputs first."""
    found: set[Node] = set()
    waiting = list(targets)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.inputs.values()
    # Inputs are created before the nodes that use them.
    return sorted(found, key=lambda node: node.number)
