"""status: rows, bytes and seconds of the stages that a run has published."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table

from dpt_ray.config import Config
from dpt_ray.pipeline.status import status


def status_table(config: Config) -> Table:
    """Return a row for each node of a run; "-" where it is not published."""
    table = Table("stage", "artifact")
    for column in ("rows", "size", "seconds"):
        table.add_column(column, justify="right")
    for row in status(config):
        manifest, cells = row.manifest, ["-"] * 3
        if manifest:
            cells = [str(manifest.get("rows", "")), decimal(row.bytes), f"{manifest['seconds']:.1f}"]
        table.add_row(row.name, row.artifact, *cells)
    return table
