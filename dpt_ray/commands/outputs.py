"""list, remove: the artifacts of an output and the runs that refer to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from rich.filesize import decimal
from rich.table import Table

from dpt_ray.config import ConfigError
from dpt_ray.pipeline.output import expanded, holds_runs
from dpt_ray.pipeline.run_folder import references
from dpt_ray.store.artifact import Store
from dpt_ray.store.lease import live_holders


def outputs_table(output: str) -> Table:
    """Return a row for each artifact of an output: name, size and runs. Raises ConfigError without runs."""
    store = _open(output)
    used = references(store)
    table, total = Table("artifact", "size", "runs"), 0
    for stage, digest, size in store.all_artifacts():
        total += size
        name = f"{stage}/{digest}"
        table.add_row(name, decimal(size), ", ".join(used.get(name, ["-"])))
    table.caption = f"{decimal(total)} in all"
    return table


def remove_outputs(
    output: str, names: Collection[str], unused: bool, confirm: Callable[[str], object]
) -> str:
    """Remove artifacts by name (STAGE/HASH), with `unused` also all without a run; return a summary.

    `confirm(question)` is called before anything is removed and raises to prevent it. What a run came to need
    meanwhile stays, and of the unused ones what is being made. Raises ConfigError for an output without runs,
    for no name without `unused`, for a name that the output does not hold, and where it is being made.
    """
    store, wanted = _open(output), set(names)
    if not wanted and not unused:
        raise ConfigError(
            f"{output}: nothing to remove is named; give artifacts as STAGE/HASH, or --unused for every one "
            "that no run refers to"
        )
    sizes = {f"{stage}/{digest}": size for stage, digest, size in store.all_artifacts()}
    if unknown := sorted(wanted - sizes.keys()):
        raise ConfigError(f"{output}: has no {unknown[0]}; `dpt list {output}` shows what it has")
    if unused:
        wanted |= sizes.keys() - references(store).keys()
    if wanted:
        confirm(f"Remove {_what(wanted, sizes)}?")
    if unused:  # a run may have begun while the question was asked
        wanted -= references(store).keys() - set(names)
    wanted -= _leased(store, wanted, names)
    for name in sorted(wanted):
        store.remove(*name.split("/"))
    return f"removed {_what(wanted, sizes)}"


def _what(names: Collection[str], sizes: Mapping[str, int]) -> str:
    return f"{len(names)} artifacts ({decimal(sum(sizes[name] for name in names))})"


def _leased(store: Store, wanted: Collection[str], named: Collection[str]) -> set[str]:
    """Return those artifacts that a process is making. Raises ConfigError where one of them is `named`."""
    holders = live_holders({name: store.artifact(*name.split("/")) for name in wanted})
    for name in sorted(holders.keys() & set(named)):
        raise ConfigError(
            f"{name} is being made by {holders[name]}; wait for that run or stop it: nothing is removed"
        )
    return set(holders)


def _open(output: str) -> Store:
    store = Store(expanded(output))
    if not holds_runs(store):
        raise ConfigError(f"output: {output!r} holds no runs; give the folder or URI that `output` names")
    return store
