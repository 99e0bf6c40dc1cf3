"""The output of a run, resolved and checked before any work."""

from __future__ import annotations

from pathlib import Path

from dpt_ray.cluster.ray_internals import in_job
from dpt_ray.cluster.session import alive_nodes, joins_another
from dpt_ray.cluster.shared_folder import node_without
from dpt_ray.config import Config, ConfigError
from dpt_ray.store.artifact import Artifact, Store


def find_store(config: Config) -> Store:
    """Return the store of a run's output. Raises ConfigError if it would be lost or cannot be read."""
    store = Store(_output(config))
    holds_runs(store)
    return store


def holds_runs(store: Store) -> bool:
    """Return whether anything was published to a store. Raises ConfigError if it cannot be read."""
    try:
        return Artifact(store.uri).exists("store")
    except Exception as error:  # each storage raises errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"output: {store.uri!r} cannot be read ({reason}); check the URI and the credentials"
        ) from error


def expanded(output: str) -> str:
    """Return a folder or URI with `~` expanded, which the shell does not do in `output=~/dpt`."""
    return output if "://" in output else str(Path(output).expanduser())


def _output(config: Config) -> str:
    output = _place(config)
    pattern = next((sign for sign in "[*?" if sign in output), "") if "://" in output else ""
    if pattern:  # what is removed there may be more than what is meant
        raise ConfigError(
            f"output: {output!r} has {pattern!r}, which object stores take for a pattern; give a prefix "
            "without it"
        )
    return output


def _place(config: Config) -> str:
    output = config.output
    if output is None:
        return _output_of_job(config) if in_job() else str(Path("outputs").absolute())
    output = expanded(output)
    if "://" in output or Path(output).is_absolute():
        return output
    if in_job():
        check_output_of_job(config)
    return str(Path(output).absolute())


def check_output_of_job(config: Config) -> None:
    """Raise ConfigError where a submitted job would lose its output, as far as the configuration tells."""
    if config.output is None:
        if config.compute.autoscaling:
            raise ConfigError(f"output: missing, and the cluster adds nodes on demand; {_GIVE}")
        return
    output = expanded(config.output)
    if "://" not in output and not Path(output).is_absolute():
        raise ConfigError(
            f"output: {output!r} is relative, and the working folder of a submitted job is removed after it; "
            f"{_GIVE}"
        )


_GIVE = "give an absolute path or URI that all nodes reach, such as output=s3://..."


def _output_of_job(config: Config) -> str:
    """Return a folder in the home folder, which outlives the job; on several nodes raise ConfigError."""
    check_output_of_job(config)
    nodes = alive_nodes(config.compute)
    if nodes > 1:
        raise ConfigError(f"output: missing, and the cluster has {nodes} nodes; {_GIVE}")
    return str(Path.home() / "dpt_ray_outputs")


def open_store(config: Config) -> Store:
    """Return the store of a run's output. Raises ConfigError if it would be lost or cannot be written."""
    store = find_store(config)
    try:
        store.check_writable()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return store


def check_shared(config: Config, store: Store) -> None:
    """Raise ConfigError where a node of the cluster that a run joins does not see its local output."""
    folder = Artifact(store.uri)
    if joins_another() and folder.is_local and (node := node_without(folder.path(""), config.compute)):
        raise ConfigError(
            f"output: what is written to {store.uri!r} here is not seen on the cluster's node {node}; {_GIVE}"
        )
