"""Where a run publishes: its output, found or refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

from dpt_ray.cluster.session import alive_nodes
from dpt_ray.config import Config, ConfigError
from dpt_ray.store.artifact import Artifact, Store


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
    nodes = alive_nodes(config.compute)
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
