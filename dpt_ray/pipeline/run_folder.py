"""`runs/NAME/`, where a person finds what a run has made without knowing a hash."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpt_ray.config import Config, ConfigError, to_yaml
from dpt_ray.engine.node import Node
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.output import find_store
from dpt_ray.store.artifact import Artifact, Store, local_copy

# Which artifacts a run rests on, by node: those it will, while it goes, and those it does.
PLANNED = "planned.json"
MADE = "artifacts.json"

# Where a person finds an artifact, by node: (name in the run's folder, file of the artifact or all of it).
SHOWN = {
    "report": ("report.html", "report.html"),
    "pseudo_labels": ("pseudo_labels.parquet", "pseudo_labels.parquet"),
    "probe": ("probe.json", "probe.json"),
    "retrained": ("classifier", ""),
    "sweep": ("classifier", "generated"),  # where there is one, it takes the place of the configured one
    "denoiser": ("denoiser", ""),
    "samples": ("samples", ""),
    "evaluation": ("evaluation.json", "evaluation.json"),
    "image_metrics": ("image_metrics.json", "image_metrics.json"),
}


def link(config: Config, nodes: dict[str, Node], store: Store) -> Artifact:
    """Writes `runs/NAME/`: the resolved configuration, what each node is, and the way to the results."""
    folder = store.run_folder(config.name)
    published = {name: node for name, node in nodes.items() if is_published(node, store)}
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    folder.write_json(MADE, node_references(published))
    if folder.exists(PLANNED):
        folder.fs.rm_file(folder.path(PLANNED))
    there = {SHOWN[name][0]: (name, SHOWN[name][1]) for name in SHOWN if name in published}
    for shown, _ in SHOWN.values():
        if shown in there:
            name, file = there[shown]
            _refer(folder, shown, published[name].artifact(store), file)
        else:
            _forget(folder, shown)
    return folder


def sets_made(config: Config) -> Iterator[dict[str, Artifact]]:
    """What a run has made, by node: with this configuration and its images as they are, and as recorded.

    What was made before images were added, moved or removed belongs together, and stays of use: the
    second set is what the run of this name rested on, if its configuration was the same but for where
    images lie and how it was computed. Raises ConfigError if the images cannot be listed and there is none.
    """
    store, unlisted = find_store(config), None
    try:
        nodes = flow(config)
        yield {name: node.artifact(store) for name, node in nodes.items() if is_published(node, store)}
    except ConfigError as error:
        unlisted = error
    folder = store.run_folder(config.name)
    if folder.exists(MADE) and _settings(to_yaml(config)) == _settings(folder.read_bytes("config.yaml")):
        recorded = {name: _referred(store, to) for name, to in folder.read_json(MADE).items()}
        yield {name: artifact for name, artifact in recorded.items() if artifact.published}
    elif unlisted:
        raise unlisted


def _settings(text: str | bytes) -> dict[str, Any]:
    """What of a configuration says what is made of the images."""
    sections = {key: value for key, value in yaml.safe_load(text).items() if key not in ("compute", "output")}
    return sections | {"data": {**sections["data"], "uri": None}}


def shown_uri(folder: Artifact, shown: str) -> str:
    """The URI of what a run's folder shows under a name (see `_refer`)."""
    return folder.file_uri(shown) if folder.is_local else str(folder.read_json(f"{shown}.json")["uri"])


def shown_json(folder: Artifact, shown: str) -> Any:
    """The content of a JSON file that a run's folder shows."""
    return json.loads(local_copy(shown_uri(folder, shown)).read_text())


def is_published(node: Node, store: Store) -> bool:
    """Return whether a node can be made and its artifact is complete."""
    return not node.missing and node.artifact(store).published


def node_references(nodes: Mapping[str, Node]) -> dict[str, str]:
    """Return STAGE/IDENTITY of each node whose files can be read."""
    there = {name: node for name, node in nodes.items() if not node.missing}
    return {name: f"{node.artifact_name}/{node.reference}" for name, node in there.items()}


def _referred(store: Store, reference: str) -> Artifact:
    stage, _, identity = reference.partition("/")
    digest, _, extent = identity.partition("@")
    return store.artifact(stage, digest, extent)


def _forget(folder: Artifact, shown: str) -> None:
    """Removes the way to what an earlier configuration of the run's name had made."""
    if folder.is_local:
        Path(folder.path(shown)).unlink(missing_ok=True)
    elif folder.exists(f"{shown}.json"):
        folder.fs.rm_file(folder.path(f"{shown}.json"))


def _refer(folder: Artifact, shown: str, artifact: Artifact, file: str) -> None:
    """A relative link on a local disk; elsewhere a small JSON file with the URI."""
    target = artifact.file_uri(file) if file else artifact.uri
    if not folder.is_local:
        folder.write_bytes(f"{shown}.json", json.dumps({"uri": target}).encode())
        return
    link_path = Path(folder.path(shown))
    part = link_path.with_name(f".{shown}.tmp")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(artifact.path(file).rstrip("/"), link_path.parent))
    part.replace(link_path)


def references(store: Store) -> dict[str, list[str]]:
    """The names of the runs that refer to each STAGE/HASH of a store."""
    root = Artifact(f"{store.uri.rstrip('/')}/runs")
    found: dict[str, set[str]] = {}
    folders = root.fs.ls(root.path(""), detail=False) if root.exists("") else []
    for name in (folder.rstrip("/").rpartition("/")[2] for folder in folders):
        for file in filter(root.exists, (f"{name}/{MADE}", f"{name}/{PLANNED}")):
            for reference in root.read_json(file).values():
                found.setdefault(reference.split("@")[0], set()).add(name)
    return {key: sorted(names) for key, names in found.items()}
