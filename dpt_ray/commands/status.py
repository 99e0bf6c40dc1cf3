"""status: rows, bytes and seconds of the stages that a run has published, and the GPU hours it has spent."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Column, Table

from dpt_ray.config import Config
from dpt_ray.engine.spending import attempts, hours
from dpt_ray.pipeline.output import find_store
from dpt_ray.pipeline.status import status


def status_table(config: Config) -> Table:
    """Return a row for each node of a run: how far it is, and of a published one what it holds and took."""
    table = Table(Column("stage", no_wrap=True), "artifact", "state")
    for column in ("rows", "unreadable", "size", "seconds", "GPU hours"):
        table.add_column(column, justify="right")
    for row in status(config):
        manifest, cells = row.manifest, ["-"] * 5
        if manifest:
            spent = manifest.get("gpu_hours")
            cells = [
                str(manifest.get("rows", "")),
                str(manifest.get("quarantined", "-")),
                decimal(row.bytes),
                f"{manifest['seconds']:.1f}",
                f"{spent:.2f}" if spent else "-",
            ]
        table.add_row(row.name, row.artifact, row.state, *cells)
    folder = find_store(config).run_folder(config.name)
    if tried := [hours(attempt) for attempt in attempts(folder)]:
        cap = config.compute.max_gpu_hours
        table.caption = (
            f"this run has spent {sum(tried):.2f} GPU hours in {len(tried)} attempts at its stages"
            + (f", of {cap:g} that it may" if cap else "")
        )
    return table
