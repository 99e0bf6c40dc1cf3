"""`dpt`: Dual Pseudo Training from the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from dpt_ray.commands.interrupt import Group, interruptible
from dpt_ray.config import Config, ConfigError, load_config
from dpt_ray.config.semi_supervised import LearnerName

app = typer.Typer(
    name="dpt",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from dpt_ray.engine.code_version import code_version

        _print(f"dpt_ray {code_version()}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Dual Pseudo Training (NeurIPS 2023): pseudo-labels for every image, a class-conditional diffusion
    model, and a classifier retrained on its images.
    """


ConfigPath = Annotated[Path, typer.Argument(help="The YAML file that describes the run.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, as key.path=value.", metavar="[KEY=VALUE]...")
]
Method = Annotated[
    str | None,
    typer.Option(help="The classifier, such as student; by default the best on validation."),
]
OutputUri = Annotated[str, typer.Argument(help="The output folder or URI of the runs.", metavar="OUTPUT")]

# A command that makes a part of a run -> its help.
STAGES = {
    "index": "Index the images, read the labels and check both.",
    "pretrain": "Train or import the encoder.",
    "extract": "Compute features and moments of the images; each is decoded once.",
    "fit-classifier": "Fit the stage-1 classifier on the few labels.",
    "pseudo-label": "Label every image, with a confidence that is calibrated on validation images.",
    "probe": "Evaluate stage 1 alone: the linear probe and its pseudo-labels.",
    "ladder": "Climb the rungs of stage 1 and measure each, before any stage 2.",
    "train-diffusion": "Train the class-conditional diffusion model (stage 2).",
    "retrain": "Fit the classifier on real and generated images (stage 3).",
    "sweep": "Sweep stage 3 (images per class, real weight, lambda, filter, guidance); choose on validation.",
    "measure": "Measure the generated images: FID, sFID, IS, KID, precision, recall.",
    "evaluate": "Evaluate all classifiers on the test images.",
    "report": "Write the HTML report of the run.",
}


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    until: Annotated[
        str | None,
        typer.Option(
            help="Make this stage and what it needs, then say what comes next and its cost: a name in `dpt "
            "plan`, such as features, ladder or pilot.",
        ),
    ] = None,
) -> None:
    """Run every stage that is not done yet, from the images to the report."""
    if until is None:
        _run(load_config(config, overrides or ()), "report")
        return
    from dpt_ray.commands.results import run_until

    run_until(load_config(config, overrides or ()), until)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="As of `dpt run`.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait, and end with the job's exit code.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's log too while waiting.")] = False,
) -> None:
    """Run on the cluster in RAY_API_SERVER_ADDRESS, as a job that outlives this machine.

    The job gets a copy of the current folder without outputs, environments and .git. Submitted again, a run
    is continued, or joined while its job goes on. The output must be one that all nodes reach.
    """
    from dpt_ray.commands.submit import submit_run

    sys.exit(submit_run(config, overrides or [], until, wait, follow))


def _stage_command(name: str, help: str) -> Callable[..., None]:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        _run(load_config(config, overrides or ()), name)

    command.__name__ = name.replace("-", "_")
    command.__doc__ = f"{help} Missing inputs are made first."
    return command


for _name, _help in STAGES.items():
    app.command(_name, rich_help_panel="One stage")(_stage_command(_name, _help))


@app.command(rich_help_panel="One stage")
def generate(
    config: ConfigPath,
    overrides: Overrides = None,
    only: Annotated[
        str | None,
        typer.Option(help="Sample only this image again, to a PNG file: CLASS/INDEX.", metavar="CLASS/INDEX"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file of --only; by default CLASS-INDEX.png.")] = None,
) -> None:
    """Generate images for each class. Missing inputs are made first."""
    if only is None:
        if out is not None:
            raise ConfigError(f"--out {out}: is the file of --only CLASS/INDEX; leave it out")
        _run(load_config(config, overrides or ()), "generate")
        return
    from dpt_ray.commands.generate_one import generate_one

    file, compared = generate_one(load_config(config, overrides or ()), only, out)
    _print(f"written: {file} ({compared})")


def _run(config: Config, command: str) -> None:
    from dpt_ray.commands.results import run_targets
    from dpt_ray.commands.targets import TARGETS

    run_targets(config, TARGETS[command])


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    images: Annotated[
        int | None,
        typer.Option(help="Compute the cost for this many training images, without reading data or weights."),
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Classes, with --images.")] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="What GPUs and storage cost, such as docs/prices.yaml: adds a table in money."),
    ] = None,
) -> None:
    """Print the state of each stage, why the missing ones are missing, and what they will cost."""
    from dpt_ray.commands.plan import plan_tables
    from dpt_ray.config.prices import load_prices

    paid = load_prices(prices) if prices else None
    for table in plan_tables(load_config(config, overrides or ()), images, classes, paid):
        _print(table)


@app.command()
def status(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the published stages of a run with rows, size and seconds."""
    from dpt_ray.commands.status import status_table

    _print(status_table(load_config(config, overrides or ())))


@app.command()
def study(
    config: ConfigPath,
    overrides: Overrides = None,
    results: Annotated[
        Path | None, typer.Option(help="Read this study.json of a finished study instead of making its runs.")
    ] = None,
) -> None:
    """Repeat a run over label draws, labels per class and encoder seeds, and print one table."""
    from dpt_ray.commands.study import run_study, show_study
    from dpt_ray.engine.progress import Display

    changes, display = overrides or [], Display()
    text = show_study(config, changes, results, display) if results else run_study(config, changes, display)
    _print(text)


@app.command()
def predict(
    config: ConfigPath,
    images: Annotated[
        str, typer.Argument(help="A folder or URI of images, tar or Parquet shards; or one of them.")
    ],
    out: Annotated[Path, typer.Option(help="The table to write: .csv or .parquet.")] = Path(
        "predictions.csv"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as key.path=value.")
    ] = None,
    method: Method = None,
) -> None:
    """Label new images with the classifier of a run that is best on validation."""
    from dpt_ray.commands.predict import predict_images

    predicted = predict_images(load_config(config, overrides or ()), images, out, method)
    _print(f"{predicted}\nwritten: {out}")


@app.command()
def init(
    uri: Annotated[str, typer.Argument(help="The folder or URI of the images, or a manifest of them.")],
    labels: Annotated[
        str | None,
        typer.Option(help="The few labels: a CSV file of id,label; leave it out before the first."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default the images' name and .yaml.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=1, help="How long a run may take on this machine.")
    ] = None,
    learner: Annotated[
        LearnerName,
        typer.Option(help="What stages 1 and 3 train; all but linear train the encoder, too."),
    ] = "linear",
) -> None:
    """Write a configuration for your own images, fitted to their number and size and to this machine."""
    from dpt_ray.commands.init import write_config

    path, found, time = write_config(uri, labels, out, minutes, learner)
    then = "plan" if labels else "suggest"
    written = f"written: {path}; read it, then `dpt {then} {path}{'' if labels else ' 40'}`"
    _print("\n".join((str(found), *found.notes, f"time: {time}", written)))


@app.command()
def suggest(
    config: ConfigPath,
    images: Annotated[int, typer.Argument(help="How many images to label.", min=1, metavar="N")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The folder to write to_label.csv and to_label.html to.")] = Path(
        "to_label"
    ),
    given: Annotated[
        str | None,
        typer.Option(help="A label list of images to pass over; by default labels.file, where it exists."),
    ] = None,
) -> None:
    """Choose the N images that are worth labelling, and write a page to label them on in a browser.

    They are the most central ones of clusters of the run's features, which are made first where they are
    missing. No label has to exist yet. The page saves labels.csv, which labels.file takes.
    """
    from dpt_ray.commands.suggest import suggest_images

    suggested = suggest_images(load_config(config, overrides or ()), images, out, given)
    _print(str(suggested).replace("CONFIG", str(config)))


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
    _print(f"{rows} images written: {out}")


@app.command("export-model")
def export_model(
    config: ConfigPath,
    format: Annotated[
        str,
        typer.Argument(
            help="nnet_ema (the published U-ViT's) or safetensors of the denoiser; classifier, or onnx "
            "with its encoder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as key.path=value.")
    ] = None,
    method: Method = None,
) -> None:
    """Write a run's denoiser as published weights or as safetensors, or its best classifier on validation."""
    from dpt_ray.commands import export

    parameters = export.export_model(load_config(config, overrides or ()), format, out, method)
    _print(f"{parameters} parameters written: {out}")


@app.command("list", rich_help_panel="Outputs")
def list_outputs(output: OutputUri) -> None:
    """List all artifacts with their sizes and the runs that refer to them."""
    from dpt_ray.commands.outputs import outputs_table

    _print(outputs_table(output))


@app.command(rich_help_panel="Outputs")
def remove(
    output: OutputUri,
    artifacts: Annotated[
        list[str] | None, typer.Argument(help="The artifacts to remove, as STAGE/HASH.")
    ] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help="Remove every artifact that no run refers to.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove artifacts by name, or every one that no run refers to."""
    from dpt_ray.commands.outputs import remove_outputs

    def confirm(question: str) -> None:
        if not yes:
            typer.confirm(question, abort=True)

    _print(remove_outputs(output, artifacts or (), unused, confirm))


def _print(shown: Table | str) -> None:
    from dpt_ray.commands.console import output_console

    output_console().print(shown, soft_wrap=isinstance(shown, str))


def job(command: str, doc: str) -> None:
    """Run `dpt COMMAND CONFIG [KEY=VALUE]...` for a script in jobs/, which takes the file as --config."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    options = parser.parse_args()
    sys.argv = ["dpt", command, options.config, *options.overrides]
    main()


def main() -> None:
    """Run `dpt`: exit code 2 and one line for bad input, 1 for a failed stage, 130 for Ctrl-C."""
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
