"""Compare a node with published artifacts; the only reader of the settings in a manifest."""

from __future__ import annotations

from collections.abc import Iterator

from dpt_ray.config.hashing import differences
from dpt_ray.engine.node import Node
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.store.records import Manifest


def why_not_done(node: Node, store: Store) -> str:
    """Return how a node differs from the nearest published artifact, or that none is published."""
    changes = [_changes(node, other.manifest) for _, other in _others(node, store)]
    if not changes:
        return "not made yet"
    nearest = min(changes, key=len)
    return nearest[0] + (f" (and {len(nearest) - 1} more)" if len(nearest) > 1 else "")


def same_but_for(node: Node, store: Store, setting: str) -> list[tuple[object, str, Artifact]]:
    """Return (value of `setting`, digest, artifact) of published artifacts that differ only in it."""
    mine = {key: value for key, value in node.hashed.items() if key != setting}
    found = []
    for digest, artifact in _others(node, store):
        manifest = artifact.manifest
        settings = dict(manifest["settings"])
        value = settings.pop(setting, None)
        if (settings, manifest["inputs"], manifest["version"]) == (mine, node.references, node.version):
            found.append((value, digest, artifact))
    return found


def same_in(node: Node, store: Store, setting: str) -> list[Artifact]:
    """Return the other published artifacts of the node's stage and version with its value of `setting`."""
    mine = node.hashed.get(setting), node.version
    manifests = [(artifact, artifact.manifest) for _, artifact in _others(node, store)]
    return [one for one, said in manifests if (said["settings"].get(setting), said["version"]) == mine]


def changed_settings(node: Node, artifact: Artifact) -> list[str]:
    """Return how a node's settings differ from those of an artifact of its stage."""
    return differences(node.hashed, artifact.manifest["settings"])


def _others(node: Node, store: Store) -> Iterator[tuple[str, Artifact]]:
    """Yield (digest, artifact) of the other published artifacts of the node's stage at its extent."""
    for digest in store.digests(node.artifact_name):
        artifact = store.artifact(node.artifact_name, digest, str(node.extent))
        if digest != node.digest and artifact.published:
            yield digest, artifact


def content_digest(artifact: Artifact) -> str:
    """Return the SHA-256 of the file from which an artifact was imported."""
    return str(artifact.manifest["settings"]["sha256"])


def _changes(node: Node, old: Manifest) -> list[str]:
    """Return how a node differs from a published artifact; at least one line."""
    inputs = node.references
    changes = differences(node.hashed, old["settings"])
    changes += [
        f"{key} differs" for key in {**inputs, **old["inputs"]} if inputs.get(key) != old["inputs"].get(key)
    ]
    return changes or [f"algorithm version {node.version}, published with {old['version']}"]
