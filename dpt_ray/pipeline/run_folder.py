"""`runs/NAME/`: links to the results of a run, so that nobody needs to know hashes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dpt_ray.config import Config, ConfigError, to_yaml
from dpt_ray.config.yaml_file import build
from dpt_ray.engine.differences import changed_settings
from dpt_ray.engine.node import Node
from dpt_ray.pipeline.best_setting import best_config
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.output import find_store
from dpt_ray.store.artifact import Artifact, Store, local_copy

# STAGE/IDENTITY of the artifacts of a run by node: all of them until they are made, and those made.
PLANNED = "planned.json"
MADE = "artifacts.json"
BEST = "best.yaml"

# Links to artifacts by node: (name in the run's folder, file of the artifact or "" for all of it).
SHOWN = {
    "report": ("report.html", "report.html"),
    "pseudo_labels": ("pseudo_labels.parquet", "pseudo_labels.parquet"),
    "learner_labels": ("pseudo_labels.parquet", "pseudo_labels.parquet"),  # replace those of the probe
    "learner": ("learner", ""),
    "retrained_learner": ("learner", ""),  # replaces that of stage 1
    "student": ("student", ""),
    "probe": ("probe.json", "probe.json"),
    "ladder": ("ladder.json", "ladder.json"),
    "pilot": ("pilot.json", "ladder.json"),
    "generated_features": ("classifier", ""),  # replaced by the one of images where there is one
    "retrained": ("classifier", ""),
    "sweep": ("classifier", "generated"),  # replaces the retrained one where there is a sweep
    "denoiser": ("denoiser", ""),
    "samples": ("samples", ""),
    "evaluation": ("evaluation.json", "evaluation.json"),
    "image_metrics": ("image_metrics.json", "image_metrics.json"),
}


def link(config: Config, nodes: dict[str, Node], store: Store) -> Artifact:
    """Write `runs/NAME/`: the configuration, the artifact of each node, and links to the results."""
    folder = store.run_folder(config.name)
    published = {name: node for name, node in nodes.items() if is_published(node, store)}
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    folder.write_json(MADE, node_references(published))
    # The unfinished artifacts of an interrupted run stay in use when a part of it runs again.
    if len(published) == len(nodes) and folder.exists(PLANNED):
        folder.fs.rm_file(folder.path(PLANNED))
    _write_best(folder, config, published.get("sweep"), store)
    shown_nodes = [name for name in SHOWN if name in published]
    if "sample_features" not in nodes and "sweep" in shown_nodes:
        shown_nodes.remove("sweep")  # that of the controls alone has no classifier of DPT
    links = {SHOWN[name][0]: (name, SHOWN[name][1]) for name in shown_nodes}
    for shown, _ in SHOWN.values():
        if shown in links:
            name, file = links[shown]
            _refer(folder, shown, published[name].artifact(store), file)
        else:
            _forget(folder, shown)
    return folder


def _write_best(folder: Artifact, config: Config, sweep: Node | None, store: Store) -> None:
    """Write the configuration with the setting that the sweep chose; remove that of an earlier sweep."""
    best = best_config(config, sweep.artifact(store)) if sweep and config.sweep else None
    if best:
        folder.write_bytes(BEST, to_yaml(best).encode())
    elif folder.exists(BEST):
        folder.fs.rm_file(folder.path(BEST))


def sets_made(config: Config) -> Iterator[dict[str, Artifact]]:
    """Yield the published artifacts of a run by node: first for the present images, then as recorded.

    The recorded set was made before images were added, moved or removed; it is consistent in itself and
    remains usable. It is yielded if the run of this name had the same configuration except for the
    location of the images and `compute`; a label list that was changed since is warned of. Raises
    ConfigError if the images cannot be listed and no set is recorded.
    """
    store, unlisted, nodes = find_store(config), None, dict[str, Node]()
    try:
        nodes = flow(config)
        yield {name: node.artifact(store) for name, node in nodes.items() if is_published(node, store)}
    except ConfigError as error:
        unlisted = error
    folder = store.run_folder(config.name)
    if folder.exists(MADE) and _settings(to_yaml(config)) == _settings(folder.read_bytes("config.yaml")):
        recorded = {name: _referred(store, to) for name, to in folder.read_json(MADE).items()}
        recorded = {name: artifact for name, artifact in recorded.items() if artifact.published}
        _warn_of_other_labels(config, nodes.get("labels"), recorded.get("labels"))
        yield recorded
    elif unlisted:
        raise unlisted


def _warn_of_other_labels(config: Config, labels: Node | None, recorded: Artifact | None) -> None:
    """Warn where the label list is another than the one that the recorded artifacts are of."""
    if labels and recorded and not labels.missing and changed_settings(labels, recorded):
        logging.getLogger("dpt_ray").warning(
            "labels.file %s was another list when this run was made, and its classifiers are of that one: "
            "`dpt run CONFIG` first for the present labels",
            config.labels.file,
        )


def _settings(text: str | bytes) -> dict[str, Any]:
    """Return the settings that affect results, without the location of the images.

    Settings that did not exist when the text was written have their defaults.
    """
    tree = yaml.safe_load(text)
    with suppress(ConfigError):  # of a later version: it differs
        tree = build(Config, tree, "config.yaml").model_dump(mode="json")
    sections = {key: value for key, value in tree.items() if key not in ("compute", "output")}
    return sections | {"data": {**sections["data"], "uri": None}}


def shown_uri(folder: Artifact, shown: str) -> str:
    """Return the URI behind a name in a run's folder (see `_refer`)."""
    return folder.file_uri(shown) if folder.is_local else str(folder.read_json(f"{shown}.json")["uri"])


def shown_json(folder: Artifact, shown: str) -> Any:
    """Return the content of a JSON file linked in a run's folder."""
    return json.loads(local_copy(shown_uri(folder, shown)).read_text())


def is_published(node: Node, store: Store) -> bool:
    """Return whether the files of a node can be read and its artifact is published."""
    return not node.missing and node.artifact(store).published


def node_references(nodes: Mapping[str, Node]) -> dict[str, str]:
    """Return STAGE/IDENTITY of each node whose files can be read."""
    readable = {name: node for name, node in nodes.items() if not node.missing}
    return {name: f"{node.artifact_name}/{node.reference}" for name, node in readable.items()}


def _referred(store: Store, reference: str) -> Artifact:
    stage, _, identity = reference.partition("/")
    digest, _, extent = identity.partition("@")
    return store.artifact(stage, digest, extent)


def _forget(folder: Artifact, shown: str) -> None:
    """Remove a link left by an earlier configuration of the same name."""
    if folder.is_local:
        Path(folder.path(shown)).unlink(missing_ok=True)
    elif folder.exists(f"{shown}.json"):
        folder.fs.rm_file(folder.path(f"{shown}.json"))


def _refer(folder: Artifact, shown: str, artifact: Artifact, file: str) -> None:
    """Link an artifact: a relative symlink on a local disk, elsewhere a JSON file with the URI."""
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
    """Return the names of the runs that refer to each STAGE/HASH of a store."""
    root = Artifact(f"{store.uri.rstrip('/')}/runs")
    found: dict[str, set[str]] = {}
    folders = root.fs.ls(root.path(""), detail=False) if root.exists("") else []
    for name in (folder.rstrip("/").rpartition("/")[2] for folder in folders):
        for file in filter(root.exists, (f"{name}/{MADE}", f"{name}/{PLANNED}")):
            for reference in root.read_json(file).values():
                found.setdefault(reference.split("@")[0], set()).add(name)
    return {key: sorted(names) for key, names in found.items()}
