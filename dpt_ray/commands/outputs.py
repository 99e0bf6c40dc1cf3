"""list, remove: the artifacts of an output and the runs that refer to them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rich.filesize import decimal
from rich.table import Table

from dpt_ray.config import ConfigError
from dpt_ray.pipeline.output import expanded, holds_runs
from dpt_ray.pipeline.run_folder import references
from dpt_ray.store.artifact import Store


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

    `confirm(question)` is called before anything is removed and raises to prevent it. Raises ConfigError
    for an output without runs and for a name that it does not hold.
    """
    store, wanted = _open(output), set(names)
    sizes = {f"{stage}/{digest}": size for stage, digest, size in store.all_artifacts()}
    if unknown := sorted(wanted - sizes.keys()):
        raise ConfigError(f"{output}: has no {unknown[0]}; `dpt list {output}` shows what it has")
    if unused:
        wanted |= sizes.keys() - references(store).keys()
    what = f"{len(wanted)} artifacts ({decimal(sum(sizes[name] for name in wanted))})"
    if wanted:
        confirm(f"Remove {what}?")
    for name in sorted(wanted):
        store.remove(*name.split("/"))
    return f"removed {what}"


def _open(output: str) -> Store:
    store = Store(expanded(output))
    if not holds_runs(store):
        raise ConfigError(f"output: {output!r} holds no runs; give the folder or URI that `output` names")
    return store
