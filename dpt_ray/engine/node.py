"""A node of the flow: what an artifact is made of, and what its maker is handed.

A node is plain data. Its identity hashes its stage, a hand-raised algorithm version, its settings and
the identities of its inputs. Nodes of one `group` are made together by one pass over the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Compute
from dpt_ray.engine.progress import Report, silent
from dpt_ray.store.artifact import Artifact, Store, identity


@dataclass(frozen=True, eq=False)
class Node:
    """One artifact to be: `maker` is the module of `dpt_ray.stages` that makes it.

    `extent` (such as "k128") names how much of a growing artifact is meant. It is not part of the
    artifact's own identity; it is part of the identity of what is made from that much of it, unless
    that grows along with it. `unhashed` settings (paths of hashed files, intervals of saving) reach the
    maker without deciding the result, and so do the `watched` artifacts, which must be there as well.
    `unreadable` is what is wrong with a file of the user's that belongs to the settings, in one line: such
    a node has no identity, and stops only those who ask for it.
    """

    name: str
    stage: str
    maker: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, Node] = field(default_factory=dict)
    extent: str = ""
    group: str = ""
    unhashed: Mapping[str, Any] = field(default_factory=dict)
    watched: Mapping[str, Node] = field(default_factory=dict)
    unreadable: str = ""

    @property
    def needs(self) -> Mapping[str, Node]:
        """All artifacts that the maker is handed."""
        return {**self.watched, **self.inputs}

    @cached_property
    def missing(self) -> str:
        """Why this node cannot be made: the first unreadable file among what it needs; "" where none is."""
        return self.unreadable or next((node.missing for node in self.needs.values() if node.missing), "")

    @cached_property
    def digest(self) -> str:
        """The identity hash: the folder's name in the store. Raises ConfigError where a file is missing."""
        if self.missing:
            raise ConfigError(self.missing)
        inputs = {key: node.digest if self.extent else node.reference for key, node in self.inputs.items()}
        return identity(self.stage, self.version, self.settings, inputs)

    @property
    def reference(self) -> str:
        """The identity with the extent."""
        return f"{self.digest}@{self.extent}" if self.extent else self.digest

    def artifact(self, store: Store) -> Artifact:
        """Where it is, or will be."""
        return store.artifact(self.stage, self.digest, self.extent)


@dataclass(frozen=True)
class Task:
    """What a maker is handed: where to write, what to read, how to run, whom to tell."""

    node: Node
    out: Artifact
    inputs: Mapping[str, Artifact]
    compute: Compute
    run_started: str
    progress: Report = silent

    @property
    def settings(self) -> Mapping[str, Any]:
        """All settings, those that do not decide the result too."""
        return {**self.node.settings, **self.node.unhashed}


def topological(targets: list[Node]) -> list[Node]:
    """The targets and all that making them needs, each once, inputs first."""
    order: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if id(node) not in order:
            for source in node.needs.values():
                visit(source)
            order[id(node)] = node

    for target in targets:
        visit(target)
    return list(order.values())
