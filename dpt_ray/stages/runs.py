"""A run: its flow carried out, and `runs/NAME/` where a person finds what came out of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpt_ray.artifacts import Artifact, Store
from dpt_ray.config import Config, ConfigError, to_yaml
from dpt_ray.stages.display import Display
from dpt_ray.stages.execute import Outcome, execute
from dpt_ray.stages.graph import flow
from dpt_ray.stages.node import Node

# Where a person finds an artifact, by node: (name in the run's folder, file of the artifact or all of it).
SHOWN = {
    "report": ("report.html", "report.html"),
    "pseudo_labels": ("pseudo_labels.parquet", "pseudo_labels.parquet"),
    "sweep": ("classifier", "generated"),
    "denoiser": ("denoiser", ""),
    "samples": ("samples", ""),
    "evaluation": ("evaluation.json", "evaluation.json"),
}


def open_store(config: Config) -> Store:
    """The store of a run's output. Raises ConfigError if it cannot be written or would be lost."""
    if "://" not in config.output and not Path(config.output).is_absolute():
        if "RAY_JOB_ID" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            raise ConfigError(
                f"output: {config.output!r} is relative, and the folder that a submitted job runs in is "
                "removed after it; give an absolute path or URI that all nodes reach, as output=s3://..."
            )
        store = Store(str(Path(config.output).absolute()))
    else:
        store = Store(config.output)
    try:
        store.check_writable()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return store


def run(config: Config, display: Display, targets: Sequence[str] = ("report",)) -> tuple[Outcome, Store]:
    """Makes what is missing for the targets (names of nodes) and points the run's folder at it."""
    store = open_store(config)
    nodes = flow(config)
    for name in ("labels", *targets):  # a bad label list is told before any work
        if name not in nodes:
            raise ConfigError(f"this configuration has no {name.replace('_', ' ')} stage")
    outcome = execute([nodes["labels"], *(nodes[name] for name in targets)], store, config.compute, display)
    link(config, nodes, store)
    return outcome, store


def link(config: Config, nodes: dict[str, Node], store: Store) -> Artifact:
    """Writes `runs/NAME/`: the resolved configuration, what each node is, and the way to the results."""
    folder = store.run_folder(config.name)
    published = {name: node for name, node in nodes.items() if node.artifact(store).published}
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    references = {name: f"{node.stage}/{node.reference}" for name, node in published.items()}
    folder.write_json("artifacts.json", references)
    for name, (shown, file) in SHOWN.items():
        if name in published:
            _refer(folder, shown, published[name].artifact(store), file)
    return folder


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


def status(config: Config) -> list[dict[str, Any]]:
    """For each node of a run: what it is, whether it is published, and else what is missing for it."""
    store = Store(config.output if "://" in config.output else str(Path(config.output).absolute()))
    rows = []
    for name, node in flow(config).items():
        artifact = node.artifact(store)
        published = artifact.published
        waiting = [key for key, source in node.inputs.items() if not source.artifact(store).published]
        rows.append(
            {
                "name": name,
                "artifact": f"{node.stage}/{node.reference}",
                "published": published,
                "shards": 0 if published else len(artifact.shards()),
                "bytes": _size(artifact) if published else 0,
                "why": "" if published else _why(node, store, waiting),
                "manifest": artifact.manifest if published else None,
            }
        )
    return rows


def references(store: Store) -> dict[str, list[str]]:
    """The names of the runs that refer to each STAGE/HASH of a store."""
    root = Artifact(f"{store.uri.rstrip('/')}/runs")
    found: dict[str, list[str]] = {}
    for path in root.fs.glob(root.path("*/artifacts.json")):
        name = path.split("/")[-2]
        for reference in root.read_json(f"{name}/artifacts.json").values():
            found.setdefault(reference.split("@")[0], []).append(name)
    return {key: sorted(set(names)) for key, names in found.items()}


def _size(artifact: Artifact) -> int:
    return int(artifact.fs.du(artifact.path("")))


def _why(node: Node, store: Store, waiting: list[str]) -> str:
    """Why a node is not done: an input is missing, a setting differs from what is there, or it is new."""
    if waiting:
        return f"waits for {', '.join(waiting[:3])}{' ...' if len(waiting) > 3 else ''}"
    for stage, digest, _ in store.all_artifacts():
        other = Artifact(f"{store.uri}/store/{stage}/{digest}", node.extent)
        if stage != node.stage or digest == node.digest or not other.published:
            continue
        old = other.manifest["settings"]
        changed = [key for key in node.settings if old.get(key) != node.settings[key]]
        if changed:
            key = changed[0]
            return f"{key} is {node.settings[key]!r}, published with {old.get(key)!r}"
        return "its inputs differ from those published"
    return "not made yet"
