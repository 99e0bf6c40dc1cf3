"""plan: the state of each stage, why the missing ones are missing, and their cost."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping

from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from dpt_ray.config import Config, ConfigError
from dpt_ray.config.prices import Prices
from dpt_ray.config.sections import Compute
from dpt_ray.engine.execute import execute
from dpt_ray.engine.progress import Display, duration
from dpt_ray.pipeline.cost import FIT_PASSES, costs, total, total_seconds
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.network_cost import DATA_SHEET_TFLOPS, Cost
from dpt_ray.pipeline.speed import Rates, training_threads
from dpt_ray.pipeline.status import status
from dpt_ray.pipeline.time_left import rates_for
from dpt_ray.store.artifact import Store
from dpt_ray.store.records import Manifest

COLUMNS = ("rows", "size", "PFLOP", "H200 hours", "here")


def plan_tables(
    config: Config, images: int | None, classes: int | None, prices: Prices | None = None
) -> list[Table]:
    """Return the tables of `dpt plan`; nothing is written to the output.

    With `images` and `classes`, return only the cost for so many training images of so many classes. With
    `prices`, a table of what is to be done costs in money is added. Raises ConfigError where only one of the
    two counts is given, or one below 1.
    """
    _check_counts(images, classes)
    if images is not None:
        held_out = {"validation": config.data.validation, "test": config.data.test}
        counts = {"train": images, **{split: count for split, count in held_out.items() if count}}
        return [
            _cost_table(config, counts, classes, done=()),
            *_priced(costs(config, counts, classes), prices),
        ]
    table = Table(Column("stage", no_wrap=True), "artifact", "runs on", "state", "why")
    rows = {row.name: row for row in status(config)}
    for row in rows.values():
        table.add_row(row.name, row.artifact, row.runs_on, row.state, row.why)
    index = rows["index"].manifest or _index_manifest(config)
    done = [name for name, row in rows.items() if row.manifest]
    present = _counts(index)
    found = costs(config, present, index["classes"])
    return [table, _cost_table(config, present, index["classes"], done), *_priced(found, prices, done)]


def _check_counts(images: int | None, classes: int | None) -> None:
    given = {"--images": images, "--classes": classes}
    for (name, count), other in zip(given.items(), reversed(given), strict=True):
        if count is not None and count < 1:
            raise ConfigError(f"{name} {count}: give at least 1")
        if count is not None and given[other] is None:
            raise ConfigError(f"{name} {count} needs {other}: give both, or neither")


def next_table(config: Config) -> Table | None:
    """Return the cost of the stages that `dpt run` has still to make; None where there are none."""
    rows = {row.name: row for row in status(config)}
    missing = [name for name, row in rows.items() if not row.manifest]
    if not missing:
        return None
    index = rows["index"].manifest or _index_manifest(config)
    done = [name for name in rows if name not in missing]
    table = _cost_table(config, _counts(index), index["classes"], done, only_missing=True)
    table.title = f"next: {missing[0].replace('_', ' ')}"
    return table


def _counts(index: Manifest) -> Mapping[str, int]:
    """Return the number of images of each split."""
    counts = Counter(train=0, validation=0, test=0)
    for unit in index["units"]:
        counts[unit["split"]] += unit["rows"]
    return counts


def _index_manifest(config: Config) -> Manifest:
    """Make the index in a temporary folder to count the images; return its manifest."""
    index = flow(config)["index"]
    with tempfile.TemporaryDirectory(prefix="dpt_ray-plan-") as folder:
        store = Store(folder)
        # The cluster's settings may be too large for the machine that plans.
        execute([index], store, Compute(), Display(Console(quiet=True)), {})
        return index.artifact(store).manifest


def _cost_table(
    config: Config,
    images: Mapping[str, int],
    classes: int | None,
    done: Collection[str],
    *,
    only_missing: bool = False,
) -> Table:
    found = costs(config, images, classes)
    missing = {name: cost for name, cost in found.items() if name not in done}
    rates = None
    if any(cost.flops for cost in missing.values()):
        rates = rates_for(config, images, classes, missing)
    table = Table("computed cost", *(Column(name, justify="right") for name in COLUMNS))
    for name, cost in (missing if only_missing else found).items():
        here = "done" if name in done else _here(cost, rates)
        table.add_row(name, *_cells(cost), here)
    if rates:
        table.add_section()
        table.add_row("total to do", *_cells(total(missing)), duration(total_seconds(missing, rates)))
        table.caption = _caption(config, rates)
    return table


def _priced(found: Mapping[str, Cost], prices: Prices | None, done: Collection[str] = ()) -> list[Table]:
    """Return the table of the price of what is not done, on each kind of GPU; none without prices."""
    if prices is None:
        return []
    missing = total({name: cost for name, cost in found.items() if name not in done})
    table = Table("GPU", *(Column(name, justify="right") for name in ("hours", prices.currency)))
    for name, gpu in prices.gpus.items():
        best = (missing.gpu_hours or 0.0) * DATA_SHEET_TFLOPS / gpu.tflops
        table.add_row(name, _range(best), _range(best * gpu.hour))
    stored = (total(found).bytes or 0.0) / 1e12 * prices.storage_tb_month
    table.caption = (
        "the networks of what is to be done, at 40 to 20% of a GPU's peak; decoding, start-up, idle nodes "
        f"and the head are not in it. Storing all artifacts costs at most {prices.currency} "
        f"{_number(stored)} a month."
    )
    return [table]


def _range(best: float) -> str:
    """Return a range from the computed best to twice of it."""
    if not best:
        return "-"
    return f"{_number(best)} to {_number(2 * best)}" if best >= 0.005 else "< 0.01"


def _cells(cost: Cost) -> list[str]:
    return [
        "-" if cost.rows is None else f"{cost.rows:,}",
        "-" if cost.bytes is None else decimal(int(cost.bytes)),
        _number(cost.flops / 1e15) if cost.flops else "-",
        _range(cost.gpu_hours or 0.0),
    ]


def _here(cost: Cost, rates: Rates | None) -> str:
    seconds = cost.seconds(rates) if rates else None
    return duration(seconds) if seconds else "-"


def _caption(config: Config, rates: Rates) -> str:
    threads = training_threads(config)
    device = "its GPU" if rates.device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    speed = f"{rates.conv / 1e9:,.0f} GFLOP/s in convolutions, {rates.transformer / 1e9:,.0f} in transformers"
    if rates.fit:
        speed += (
            f", {rates.fit / 1e9:,.1f} in the sweep's fits on CPU, of which {FIT_PASSES} passes are assumed"
        )
    resample = config.generate.resample if config.generates_images else None
    most = f" Samples: at most, each image tried {resample.attempts} times." if resample else ""
    return (
        "H200 hours: on one H200 at 40 to 20% of its peak. here: on this machine, from training steps "
        f"measured just now ({device}: {speed}). Start-up and stages without operations are not included."
        f"{most}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
