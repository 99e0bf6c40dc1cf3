"""A run: its flow carried out, and `runs/NAME/` where a person finds what came out of it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dpt_ray.cluster import session as cluster
from dpt_ray.config import Config, ConfigError, to_yaml
from dpt_ray.engine.execute import Outcome, execute
from dpt_ray.engine.node import Node, topological
from dpt_ray.engine.progress import Display
from dpt_ray.evaluation.inception_files import NOT_COMPUTED
from dpt_ray.models.precision import emulation_note
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.sweep import check_choice
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


# What of the bytes that stages/cost.py counts is written at the least: a PNG of a photograph has about
# half of its pixels' bytes.
SIZED = {"features": 1.0, "moments": 1.0, "samples": 0.5, "sample_features": 1.0}


def find_store(config: Config) -> Store:
    """The store of a run's output. Raises ConfigError for one that would be lost or cannot be read."""
    store = Store(_output(config))
    holds_runs(store)
    return store


def holds_runs(store: Store) -> bool:
    """Whether anything was published to a store. Raises ConfigError if it cannot be read."""
    try:
        return Artifact(store.uri).exists("store")
    except Exception as error:  # every kind of storage has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"output: {store.uri!r} cannot be read ({reason}); check the URI and the credentials"
        ) from error


def expanded(output: str) -> str:
    """A folder or URI with the home folder for `~`, which no shell replaces in `output=~/dpt`."""
    return output if "://" in output else str(Path(output).expanduser())


def _output(config: Config) -> str:
    output, in_job = config.output, "RAY_JOB_ID" in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if output is None:
        return _output_of_job(config) if in_job else str(Path("outputs").absolute())
    output = expanded(output)
    if "://" in output or Path(output).is_absolute():
        return output
    if in_job:
        raise ConfigError(
            f"output: {output!r} is relative, and the folder that a submitted job runs in is removed "
            "after it; give an absolute path or URI that all nodes reach, as output=s3://..."
        )
    return str(Path(output).absolute())


def _output_of_job(config: Config) -> str:
    """The home folder keeps what a job publishes, where no other machine has to reach it."""
    cluster.connect(config.compute)
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1:
        raise ConfigError(
            f"output: missing, and the cluster has {nodes} nodes; give an absolute path or URI that all of "
            "them reach, as output=s3://..."
        )
    return str(Path.home() / "dpt_ray_outputs")


def open_store(config: Config) -> Store:
    """The store of a run's output. Raises ConfigError if it cannot be written or would be lost."""
    store = find_store(config)
    try:
        store.check_writable()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return store


def run(config: Config, display: Display, targets: Sequence[str] = ("report",)) -> tuple[Outcome, Store]:
    """Makes what is missing for the targets (names of nodes) and points the run's folder at it."""
    store = open_store(config)
    if note := emulation_note(config):
        display.console.print(note, highlight=False, soft_wrap=True)
    nodes = flow(config)
    for name in targets:
        if name not in nodes:
            why = f": {NOT_COMPUTED}" if name == "image_metrics" else ""
            raise ConfigError(f"this configuration has no {name.replace('_', ' ')} stage{why}")
        if nodes[name].missing:
            raise ConfigError(nodes[name].missing)
    wanted = [nodes[name] for name in targets]
    needed, checks = topological(wanted), {}
    if nodes["labels"] in needed:  # a bad label list is told before any work
        wanted = [nodes["labels"], *wanted]
    if "sweep" in nodes and nodes["sweep"] in needed:  # and that there is nothing to choose on
        checks["index"] = partial(check_choice, nodes["sweep"])
    # From here on, all that this run will rest on is in use, however far it comes.
    store.run_folder(config.name).write_json(PLANNED, _references(nodes))
    to_write = partial(_bytes_to_write, config, nodes, store)
    outcome = execute(wanted, store, config.compute, display, checks, to_write)
    link(config, nodes, store)
    return outcome, store


def _bytes_to_write(config: Config, nodes: Mapping[str, Node], store: Store, node: Node) -> float:
    """About how many bytes the node still writes: 0 where no formula is at hand or the images are unknown."""
    from dpt_ray.pipeline.cost import Cost, costs

    index = nodes["index"].artifact(store)
    if node.name not in SIZED or not index.published:
        return 0.0
    images = Counter[str]()
    for unit in index.manifest["units"]:
        images[unit["split"]] += unit["rows"]
    cost = costs(config, images, index.manifest["classes"]).get(node.name, Cost())
    there = sum(shard["bytes"] for shard in node.artifact(store).shards().values())
    return max(0.0, (cost.bytes or 0.0) * SIZED[node.name] - there)


def link(config: Config, nodes: dict[str, Node], store: Store) -> Artifact:
    """Writes `runs/NAME/`: the resolved configuration, what each node is, and the way to the results."""
    folder = store.run_folder(config.name)
    published = {name: node for name, node in nodes.items() if _published(node, store)}
    folder.write_bytes("config.yaml", to_yaml(config).encode())
    folder.write_json(MADE, _references(published))
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
        yield {name: node.artifact(store) for name, node in nodes.items() if _published(node, store)}
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


def _published(node: Node, store: Store) -> bool:
    return not node.missing and node.artifact(store).published


def _references(nodes: Mapping[str, Node]) -> dict[str, str]:
    return {name: f"{node.stage}/{node.reference}" for name, node in nodes.items() if not node.missing}


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


def status(config: Config) -> list[dict[str, Any]]:
    """For each node of a run: what it is, whether it is published, and else what is missing for it."""
    store, nodes = find_store(config), flow(config)
    done = {name for name, node in nodes.items() if _published(node, store)}
    return [_status(node, store, done) for node in nodes.values()]


def _status(node: Node, store: Store, done: set[str]) -> dict[str, Any]:
    row = {"name": node.name, "artifact": node.stage, "published": False, "shards": 0, "bytes": 0}
    waiting = [source.name for source in node.needs.values() if source.name not in done]
    if node.missing:
        return row | {"why": node.unreadable or _waits(waiting), "manifest": None}
    artifact = node.artifact(store)
    row["artifact"] = f"{node.stage}/{node.reference}"
    if node.name in done:
        found = {"published": True, "bytes": _size(artifact), "why": "", "manifest": artifact.manifest}
        return row | found
    why = _waits(waiting) if waiting else _why(node, store)
    return row | {"shards": len(artifact.shards()), "why": why, "manifest": None}


def _waits(waiting: list[str]) -> str:
    return f"waits for {', '.join(waiting[:3])}{' ...' if len(waiting) > 3 else ''}"


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


def _size(artifact: Artifact) -> int:
    return int(artifact.fs.du(artifact.path("")))


def _why(node: Node, store: Store) -> str:
    """Why a node whose inputs are there is not done: it differs from what is published, or it is new."""
    others = [store.artifact(node.stage, digest, node.extent) for digest in store.digests(node.stage)]
    changes = [_changes(node, other.manifest) for other in others if other.published]
    if not changes:
        return "not made yet"
    nearest = min(changes, key=len)
    return nearest[0] + (f" (and {len(nearest) - 1} more)" if len(nearest) > 1 else "")


def _changes(node: Node, old: Mapping[str, Any]) -> list[str]:
    """How a node differs from a published one; at least in one thing, or they would be the same."""
    settings = {
        key: (node.settings.get(key), old["settings"].get(key))
        for key in {**node.settings, **old["settings"]}
    }
    changes = [
        f"{key} is {now!r}, published with {before!r}"
        for key, (now, before) in settings.items()
        if now != before
    ]
    inputs = {key: f"{source.stage}/{source.reference}" for key, source in node.inputs.items()}
    changes += [
        f"{key} is another"
        for key in {**inputs, **old["inputs"]}
        if inputs.get(key) != old["inputs"].get(key)
    ]
    return changes or [f"algorithm version {node.version}, published with {old['version']}"]
