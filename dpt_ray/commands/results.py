"""run and its stages: the tables of results that are printed at the end."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table

from dpt_ray.commands.console import output_console
from dpt_ray.commands.plan import next_table
from dpt_ray.commands.sweep_table import sweep_table
from dpt_ray.commands.targets import until_node
from dpt_ray.config import Config
from dpt_ray.engine.progress import Display
from dpt_ray.evaluation.methods import BALANCED, METHODS, key_of, method_of
from dpt_ray.evaluation.records import (
    Difference,
    EvaluationResult,
    Gain,
    LadderResult,
    LadderRow,
    MetricRow,
    MetricsResult,
    ProbeResult,
    gain_over,
)
from dpt_ray.evaluation.student import student_text
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run import run
from dpt_ray.pipeline.run_folder import shown_json, shown_uri
from dpt_ray.store.artifact import Artifact


def run_targets(config: Config, targets: Sequence[str]) -> None:
    """Make the nodes `targets` and all they need; print their results."""
    outcome, store = run(config, Display(), targets)
    folder, console = store.run_folder(config.name), output_console()
    show_results(folder, targets, console)
    if "sweep" in targets:
        nodes = flow(config)
        console.print(sweep_table(nodes["sweep"].artifact(store).manifest, nodes["evaluation"].inputs))
    report = "report" in targets
    where = f"report: {shown_uri(folder, 'report.html')}" if report else f"results: {folder.uri}"
    console.print(where, soft_wrap=True, highlight=False)
    if not outcome.made:
        console.print("Nothing to do: every stage was done before.")


def run_until(config: Config, node: str) -> None:
    """Make a node and what it needs; print its results, and what comes next at which cost.

    Raises ConfigError, with the names of the nodes, where the configuration has none of this name.
    """
    run_targets(config, [until_node(config, node).name])
    if table := next_table(config):
        output_console().print(table)


def show_results(folder: Artifact, targets: Collection[str], console: Console) -> None:
    """Print what a run's folder holds of the measuring stages among `targets`."""
    if {"report", "evaluation"} & set(targets):
        evaluation: EvaluationResult = shown_json(folder, "evaluation.json")
        console.print(accuracy_table(evaluation))
        if "student" in evaluation:
            console.print(student_text(evaluation["student"]), highlight=False)
        _show_metrics(evaluation["frechet"], evaluation["image_metrics"], console)
        if "ladder" in evaluation:
            _show_ladder(evaluation["ladder"], console)
    if "probe" in targets:
        probe: ProbeResult = shown_json(folder, "probe.json")
        console.print(accuracy_table(probe))
    for name in {"ladder", "pilot"} & set(targets):
        ladder: LadderResult = shown_json(folder, f"{name}.json")
        console.print(accuracy_table(ladder))
        _show_ladder(ladder["ladder"], console)
    if "image_metrics" in targets:
        metrics: MetricsResult = shown_json(folder, "image_metrics.json")
        _show_metrics([], metrics, console)


def accuracy_table(result: ProbeResult) -> Table:
    """Return the accuracies of the classifiers in a probe or an evaluation."""
    rows = result["accuracy"]
    table = Table("classifier", title=f"{result['n_labels']} labels")
    for title in (
        f"validation top-1 (n={rows[0]['n_validation']})",
        f"test top-1 (n={rows[0]['n_test']})",
    ):
        table.add_column(title, justify="right")
    has_top5 = rows[0]["test_top5"] is not None
    if has_top5:
        table.add_column("test top-5", justify="right")
    for row in rows:
        values = [row["validation"], row["test"], *([row["test_top5"]] if has_top5 else [])]
        table.add_row(method_of(row).name, *("-" if value is None else f"{value:.3f}" for value in values))
    if gain := result["gain"]:
        balanced = gain_over(result, BALANCED)
        shown = "; ".join(_gain(found) for found in (gain, balanced) if found)
        table.caption = f"{shown} ({gain['kind']})"
    return table


def _gain(found: Gain) -> str:
    improved, baseline = (METHODS[key_of(found[role])].short for role in ("improved", "baseline"))
    return f"{improved} - {baseline}: {found['gain']:+.3f} +- {found['stderr']:.3f}"


def ladder_table(rows: Sequence[LadderRow]) -> Table:
    """Return the rungs of the ladder: accuracies, paired gains on test, and what each took."""
    table = Table("rung", title="the ladder")
    for title in ("chosen on", "accuracy there", "test top-1", "over the probe", "over balanced", "seconds"):
        table.add_column(title, justify="right")
    for row in rows:
        score, error = row["score"], row["score_stderr"]
        table.add_row(
            METHODS[row["method"]].short,
            f"{row['chosen_on'] or 'validation'} ({row['n']})" if row["n"] else row["chosen_on"] or "-",
            "-" if score is None or error is None else f"{score:.3f} +- {error:.3f}",
            "-" if row["test"] is None else f"{row['test']:.3f}",
            _difference(row["over_probe"]),
            _difference(row["over_balanced"]),
            f"{row['seconds']:,.0f}",
        )
    table.caption = (
        "gains: paired on the test images, +- standard error over them; seconds: of the rung's own stages, "
        "when they were made"
    )
    return table


def label_table(rows: Sequence[LadderRow]) -> Table:
    """Return how good the pseudo-labels of each rung are."""
    table = Table("rung", title="pseudo-labels of the training images")
    for title in ("right", "smallest class", "largest class", "calibration error", "images"):
        table.add_column(title, justify="right")
    for row in rows:
        if found := row.get("labels"):
            shares = (found["accuracy"], found["smallest"], found["largest"], found["ece"])
            shown = ("-" if share is None else f"{share:.1%}" for share in shares)
            table.add_row(METHODS[row["method"]].short, *shown, f"{found['n']:,}")
    table.caption = (
        "right, and the error of the confidences: over the images whose true label is known, which is used "
        "for nothing else; the classes' shares: of all training images"
    )
    return table


def _show_ladder(rows: Sequence[LadderRow], console: Console) -> None:
    console.print(ladder_table(rows))
    if any(row.get("labels") for row in rows):
        console.print(label_table(rows))


def _difference(found: Difference | None) -> str:
    return "-" if found is None else f"{found['gain']:+.3f} +- {found['stderr']:.3f}"


def metric_tables(rows: Sequence[MetricRow]) -> list[Table]:
    """Return a table for each way of measuring; a number without its way cannot be compared."""
    tables = []
    for way, measured in itertools.groupby(rows, _way):
        table = Table("metric", "images", title=way)
        table.add_column("value", justify="right")
        table.add_column("n / n reference", justify="right")
        for row in measured:
            spread = "" if row["spread"] is None else f" +- {row['spread']:.2g}"
            reference = f"{row['n_reference']:,}" if row["n_reference"] else "-"
            counts = f"{row['n_generated']:,} / {reference}"
            table.add_row(row["metric"], row["name"], f"{row['value']:.4g}{spread}", counts)
        tables.append(table)
    return tables


def _way(row: MetricRow) -> str:
    return f"{row['extractor']}; reference: {row['reference']}; resize: {row['resize']}"


def _show_metrics(frechet: Sequence[MetricRow], metrics: MetricsResult, console: Console) -> None:
    for table in metric_tables([*frechet, *metrics["rows"]]):
        console.print(table)
    for reason in metrics["left_out"]:
        console.print(f"not computed: {reason}", highlight=False, soft_wrap=True)
