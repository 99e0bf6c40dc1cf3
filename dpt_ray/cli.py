"""`dpt`: Dual Pseudo Training from the command line."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from dpt_ray.commands.interrupt import Group, interruptible
from dpt_ray.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from dpt_ray.store.artifact import Store

app = typer.Typer(
    name="dpt",
    cls=Group,
    help="Dual Pseudo Training (NeurIPS 2023): pseudo-labels for every image, a class-conditional "
    "diffusion model, and a classifier that is better for having trained on its images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigPath = Annotated[Path, typer.Argument(help="The YAML file that describes the run.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as key.path=value.", metavar="[KEY=VALUE]...")
]
OutputUri = Annotated[str, typer.Argument(help="The output folder or URI of the runs.", metavar="OUTPUT")]

# command: (nodes it makes, what it does)
STAGES = {
    "index": (["index", "labels"], "List the images and the labels, and check them."),
    "pretrain": (["labels", "encoder"], "Train or import the encoder."),
    "extract": (
        ["labels", "features", "moments"],
        "Compute features and latents of the images, one decode each.",
    ),
    "fit-classifier": (["classifier"], "Fit the stage-1 classifier on the few labels."),
    "pseudo-label": (["pseudo_labels"], "Label every image, with calibrated confidence."),
    "probe": (["probe"], "Measure stage 1 alone: the linear probe and its pseudo-labels."),
    "train-diffusion": (["denoiser"], "Train the class-conditional diffusion model (stage 2)."),
    "generate": (["samples"], "Generate images for each class."),
    "retrain": (["retrained"], "Fit the classifier on real and generated images (stage 3)."),
    "sweep": (["sweep"], "Sweep images per class, real weight and lambda; choose on validation."),
    "measure": (["image_metrics"], "Measure the generated images: FID, sFID, IS, KID, precision, recall."),
    "evaluate": (["evaluation"], "Measure on the test images."),
    "report": (["report"], "Write the page that shows it all."),
}


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run everything that is not done yet, from the images to the report."""
    _run(load_config(config, overrides or ()), ["report"])


def _stage_command(name: str, targets: list[str], help: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        _run(load_config(config, overrides or ()), targets)

    command.__name__ = name.replace("-", "_")
    command.__doc__ = f"{help} What it needs is made first."
    return command


for _name, (_targets, _help) in STAGES.items():
    app.command(_name, rich_help_panel="One stage")(_stage_command(_name, _targets, _help))


def _run(config: Config, targets: list[str]) -> None:
    from dpt_ray.engine.progress import Display
    from dpt_ray.pipeline.run import run as run_pipeline
    from dpt_ray.pipeline.run_folder import shown_json, shown_uri

    outcome, store = run_pipeline(config, Display(), targets)
    console = Console()
    folder = store.run_folder(config.name)
    if {"report", "evaluation"} & set(targets):
        evaluation = shown_json(folder, "evaluation.json")
        console.print(_accuracy_table(evaluation))
        _show_metrics(evaluation["frechet"], evaluation["image_metrics"])
    if "probe" in targets:
        console.print(_accuracy_table(shown_json(folder, "probe.json")))
    if "image_metrics" in targets:
        _show_metrics([], shown_json(folder, "image_metrics.json"))
    if "report" in targets:
        console.print(f"report: {shown_uri(folder, 'report.html')}", soft_wrap=True, highlight=False)
    else:
        console.print(f"results: {folder.uri}", soft_wrap=True, highlight=False)
    if not outcome.made:
        console.print("Nothing to do: every stage was done before.")


def _accuracy_table(evaluation: dict) -> Table:
    rows = evaluation["accuracy"]
    n_validation, n_test = rows[0]["n_validation"], rows[0]["n_test"]
    columns = {"validation": f"validation top-1 (n={n_validation})", "test": f"test top-1 (n={n_test})"}
    if rows[0]["test_top5"] is not None:
        columns["test_top5"] = "test top-5"
    table = Table("classifier", title=f"{evaluation['n_labels']} labels")
    for title in columns.values():
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row["name"], *("-" if row[key] is None else f"{row[key]:.3f}" for key in columns))
    if gain := evaluation["gain"]:
        table.caption = f"DPT - probe: {gain['gain']:+.3f} +- {gain['stderr']:.3f} ({gain['kind']})"
    return table


def _show_metrics(frechet: list[dict], metrics: dict) -> None:
    """A table for each way of measuring (a number without it says nothing), and what is left out and why."""
    ways = itertools.groupby(
        [*frechet, *metrics["rows"]],
        lambda row: f"{row['extractor']}; reference: {row['reference']}; resize: {row['resize']}",
    )
    for way, rows in ways:
        table = Table("metric", "images", title=way)
        table.add_column("value", justify="right")
        table.add_column("n / n reference", justify="right")
        for row in rows:
            spread = "" if row["spread"] is None else f" +- {row['spread']:.2g}"
            n = f"{row['n_generated']:,} / " + (f"{row['n_reference']:,}" if row["n_reference"] else "-")
            table.add_row(row["metric"], row["name"], f"{row['value']:.4g}{spread}", n)
        _show(table)
    for reason in metrics["left_out"]:
        Console(markup=False).print(f"not computed: {reason}", highlight=False, soft_wrap=True)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    images: Annotated[
        int | None, typer.Option(help="Cost for so many training images; looks at no data or weights.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Classes, with --images.")] = None,
) -> None:
    """Print what a run would do, what is done already, why the rest is not, and what it costs."""
    from dpt_ray.commands.plan import plan_tables

    for table in plan_tables(load_config(config, overrides or ()), images, classes):
        _show(table)


@app.command()
def status(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print what a run has published: rows, bytes and seconds of each stage."""
    from dpt_ray.pipeline.status import status as states

    table = Table("stage", "artifact")
    for column in ("rows", "size", "seconds"):
        table.add_column(column, justify="right")
    for row in states(load_config(config, overrides or ())):
        manifest = row.manifest
        cells = (
            [str(manifest.get("rows", "")), _size(row.bytes), f"{manifest['seconds']:.1f}"]
            if manifest
            else ["-"] * 3
        )
        table.add_row(row.name, row.artifact, *cells)
    _show(table)


@app.command()
def study(
    config: ConfigPath,
    overrides: Overrides = None,
    results: Annotated[
        Path | None, typer.Option(help="Show a finished study's study.json instead of making its runs.")
    ] = None,
) -> None:
    """Run a list of runs over label draws, labels per class and encoder seeds, and print one table."""
    from dpt_ray.commands.study import run_study, show_study
    from dpt_ray.engine.progress import Display

    changes, display = overrides or [], Display()
    text = show_study(config, changes, results, display) if results else run_study(config, changes, display)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def predict(
    config: ConfigPath,
    images: Annotated[str, typer.Argument(help="A folder or URI of images (or one image).")],
    out: Annotated[Path, typer.Option(help="The table to write: .csv or .parquet.")] = Path(
        "predictions.csv"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as key.path=value.")
    ] = None,
) -> None:
    """Label new images with the classifier of a run that is best on validation."""
    from dpt_ray.commands.predict import predict_images

    predicted = predict_images(load_config(config, overrides or ()), images, out)
    Console().print(f"{predicted}\nwritten: {out}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def init(
    uri: Annotated[str, typer.Argument(help="The folder or URI of the images, or a manifest of them.")],
    labels: Annotated[str, typer.Option(help="The few labels: a CSV file of id,label.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default the images' name and .yaml.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=1, help="The time that a run may take on this machine.")
    ] = None,
) -> None:
    """Write a starting configuration for your own images, fitted to them and to the speed of this machine."""
    from dpt_ray.commands.init import write_config

    path, found, time = write_config(uri, labels, out, minutes)
    text = f"{found}\ntime: {time}\nwritten: {path}; read it, then `dpt plan {path}`"
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    config: ConfigPath,
    format: Annotated[str, typer.Argument(help="webdataset, imagefolder or npz (ADM's).")],
    out: Annotated[Path, typer.Argument(help="The folder (or .npz file) to write.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as key.path=value.")
    ] = None,
) -> None:
    """Write a run's generated images as WebDataset tar, ImageFolder or ADM npz."""
    from dpt_ray.commands.export import export_samples

    rows = export_samples(load_config(config, overrides or ()), format, out)
    Console().print(f"{rows} images written: {out}", highlight=False)


@app.command("export-model")
def export_model(
    config: ConfigPath,
    format: Annotated[str, typer.Argument(help="nnet_ema (the published U-ViT's) or safetensors.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as key.path=value.")
    ] = None,
) -> None:
    """Write a run's trained denoiser as published weights, or as safetensors and its configuration."""
    from dpt_ray.commands import export

    parameters = export.export_model(load_config(config, overrides or ()), format, out)
    Console().print(f"{parameters} parameters written: {out}", highlight=False)


@app.command("list", rich_help_panel="Outputs")
def list_outputs(output: OutputUri) -> None:
    """List all outputs with their sizes and the runs that refer to them."""
    from dpt_ray.pipeline.run_folder import references

    store = _open(output)
    used = references(store)
    table = Table("artifact", "size", "runs")
    total = 0
    for stage, digest, size in store.all_artifacts():
        total += size
        table.add_row(f"{stage}/{digest}", _size(size), ", ".join(used.get(f"{stage}/{digest}", ["-"])))
    table.caption = f"{_size(total)} in all"
    _show(table)


@app.command(rich_help_panel="Outputs")
def remove(
    output: OutputUri,
    artifacts: Annotated[list[str] | None, typer.Argument(help="Which, as STAGE/HASH.")] = None,
    unused: Annotated[bool, typer.Option("--unused", help="All that no run refers to.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove outputs by name, or all that no run refers to."""
    from dpt_ray.pipeline.run_folder import references

    store, wanted = _open(output), set(artifacts or ())
    found = {f"{stage}/{digest}": size for stage, digest, size in store.all_artifacts()}
    if unknown := sorted(wanted - found.keys()):
        raise ConfigError(f"{output}: has no {unknown[0]}; `dpt list {output}` shows what there is")
    if unused:
        wanted |= found.keys() - references(store).keys()
    size = _size(sum(found[name] for name in wanted))
    if wanted and not yes:
        typer.confirm(f"Remove {len(wanted)} artifacts ({size})?", abort=True)
    for name in sorted(wanted):
        store.remove(*name.split("/"))
    Console().print(f"removed {len(wanted)} artifacts ({size})", highlight=False)


def _open(output: str) -> Store:
    from dpt_ray.pipeline.output import expanded, holds_runs
    from dpt_ray.store.artifact import Store

    store = Store(expanded(output))
    if not holds_runs(store):
        raise ConfigError(f"output: {output!r} holds no runs; give the folder or URI that `output` names")
    return store


def _show(table: Table) -> None:
    Console(markup=False).print(table)  # a name may hold what looks like markup


def _size(bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if bytes < 1000:
            return f"{bytes:.0f} {unit}" if unit == "B" else f"{bytes:.1f} {unit}"
        bytes /= 1000
    return f"{bytes:.1f} TB"


def job(command: str, doc: str) -> None:
    """What the scripts in jobs/ do: `dpt COMMAND CONFIG [KEY=VALUE]...` with the file as --config."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    options = parser.parse_args()
    sys.argv = ["dpt", command, options.config, *options.overrides]
    main()


def main() -> None:
    """Runs `dpt`; a bad input is one line and exit code 2, a failed stage one line and exit code 1."""
    from dpt_ray.engine.execute import StageError

    try:
        with interruptible():
            app()
    except ConfigError as error:
        _fail(f"error: {error}", 2)
    except StageError as error:
        if os.environ.get("DPT_TRACEBACK"):
            raise
        _fail(f"failed: {error}\nRun the same command again to continue; DPT_TRACEBACK=1 shows all.", 1)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
