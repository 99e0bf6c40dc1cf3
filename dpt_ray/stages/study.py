"""study: ordinary runs over label draws, labels per class and encoder seeds, and one table of them.

Runs share every stage whose identity they share. Each process works through runs of its own; the lease
of an artifact decides who makes what several of them need.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dpt_ray.config import Config, Study, load_study
from dpt_ray.evaluation.paired import PairedGain, paired_gain
from dpt_ray.stages import runs
from dpt_ray.stages.display import Display
from dpt_ray.stages.evaluate import METHODS, PAPER, PROBE
from dpt_ray.stages.execute import StageError, code_version

DPT = METHODS["generated"]
SHORT = {
    PROBE: "probe",
    METHODS["self_training"]: "self-training",
    METHODS["augmented"]: "augmentation",
    DPT: "DPT",
    PAPER: "DPT, paper's setting",
}


def run_study(path: Path, overrides: Sequence[str], display: Display) -> str:
    """Makes what is missing of all runs; returns the table and where it was written."""
    study, configs = load_study(path, overrides)
    first = next(iter(configs.values()))
    store = runs.open_store(first)
    started = time.monotonic()
    results = _run_all(configs, study.concurrent_runs, display)
    name = _name(configs)
    summary = {
        "command": " ".join(["dpt study", str(path), *overrides]),
        "study": study.model_dump(mode="json"),
        "seconds": round(time.monotonic() - started),
        "code": code_version(),
        "runs": results,
    }
    folder = store.run_folder(name)
    folder.write_json("study.json", summary)
    text = table(study, summary, name)
    folder.write_bytes("study.md", text.encode())
    folder.write_bytes("study.png", figure(study, results, configs))
    return f"{text}\nwritten: {folder.uri}"


def _run_all(configs: dict[str, Config], workers: int, display: Display) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_run_one, config): name for name, config in configs.items()}
        for number, future in enumerate(as_completed(waiting), 1):
            name = waiting[future]
            try:
                results[name] = future.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise StageError(f"run {name}: {error}") from error
            accuracy = {SHORT[row["name"]]: row["test"] for row in results[name]["accuracy"]}
            shown = ", ".join(f"{key} {value:.3f}" for key, value in accuracy.items())
            display.console.print(f"[{number}/{len(configs)}] {name}: {shown}", markup=False, highlight=False)
    return {name: results[name] for name in configs}


def _run_one(config: Config) -> dict[str, Any]:
    """One run, in a process of the study; what the evaluation says and what it rests on."""
    from rich.console import Console

    _, store = runs.run(config, Display(Console(quiet=True)), ["evaluation"])
    folder = store.run_folder(config.name)
    return runs.shown_json(folder, "evaluation.json") | {"artifacts": folder.read_json("artifacts.json")}


def _name(configs: dict[str, Config]) -> str:
    return next(iter(configs)).rsplit("-n", 1)[0]


def _key(name: str, per_class: int, seed: int, draw: int) -> str:
    return f"{name}-n{per_class}-e{seed}-d{draw}"


def _values(
    study: Study, results: dict[str, Any], name: str, per_class: int
) -> dict[str, dict[tuple[int, int], float]]:
    """Test accuracy by method and (encoder seed, draw); Frechet distances under "frechet"."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for seed in study.encoder_seeds:
        for draw in range(study.draws):
            result = results[_key(name, per_class, seed, draw)]
            for row in result["accuracy"]:
                found.setdefault(row["name"], {})[seed, draw] = row["test"]
            for row in result["frechet"][:1]:
                found.setdefault("frechet", {})[seed, draw] = row["value"]
    return found


def spread(values: dict[tuple[int, int], float], less: dict[tuple[int, int], float] | None) -> PairedGain:
    """Mean and standard error of values (less others, paired), draws nested in encoder seeds."""
    rows = [(seed, draw, v - (less[seed, draw] if less else 0)) for (seed, draw), v in values.items()]
    return paired_gain(rows, crossed=False)


def table(study: Study, summary: dict[str, Any], name: str) -> str:
    """The study as Markdown."""
    results = summary["runs"]
    some = next(iter(results.values()))["accuracy"][0]
    extractor = next((row["extractor"] for row in next(iter(results.values()))["frechet"]), None)
    n_runs = len(study.encoder_seeds) * study.draws
    lines = [
        f"# {name}",
        "",
        f"`{summary['command']}`; {summary['seconds']} s; code {summary['code']}.",
        "",
        f"Top-1 on {some['n_test']} test images, mean and standard error over {n_runs} runs "
        f"({len(study.encoder_seeds)} encoder seeds x {study.draws} label draws, nested). Methods that have "
        f"settings to choose chose them on {some['n_validation']} labelled validation images.",
        "",
        "| labels per class | " + " | ".join(SHORT.values()) + " |",
        "|---" * (1 + len(SHORT)) + "|",
    ]
    gains = [
        "",
        "Paired gains of DPT (chosen on validation), and how many of the runs are above 0:",
        "",
        "| labels per class | over the probe | over self-training | over augmentation |",
        "|---|---|---|---|",
    ]
    frechet = [
        "",
        *([f"Frechet distance (lower is better); extractor: {extractor}."] if extractor else []),
        "",
        "| denoiser | distance |",
        "|---|---|",
    ]
    for per_class in study.labels_per_class:
        values = _values(study, results, name, per_class)
        cells = [_cell(spread(values[method], None)) for method in SHORT]
        lines.append(f"| {per_class} | " + " | ".join(cells) + " |")
        others = (PROBE, METHODS["self_training"], METHODS["augmented"])
        found = [spread(values[DPT], values[other]) for other in others]
        cells = [f"{_cell(gain, '+')} ({gain.positive}/{gain.total})" for gain in found]
        gains.append(f"| {per_class} | " + " | ".join(cells) + " |")
        if "frechet" in values:
            frechet.append(f"| {per_class} labels per class | {_cell(spread(values['frechet'], None))} |")
    frechet += _references(study, results, name)
    return "\n".join(lines + gains + frechet) + "\n"


def _references(study: Study, results: dict[str, Any], name: str) -> list[str]:
    """Rows of the unconditional and fully labelled denoisers, and of real against real images."""
    rows = []
    words = {"none": "no labels (unconditional)", "true_labels": "all true labels"}
    for condition in study.references:
        found = [results[f"{name}-{condition.replace('_', '-')}-e{seed}"] for seed in study.encoder_seeds]
        values = {
            (seed, 0): r["frechet"][0]["value"]
            for seed, r in zip(study.encoder_seeds, found, strict=True)
            if r["frechet"]
        }
        if values:
            rows.append(f"| {words[condition]} | {_cell(spread(values, None))} |")
    floor = next(iter(results.values()))["frechet"]
    if floor:
        rows.append(f"| real training images (floor) | {floor[1]['value']:.3f} |")
    return rows


def _cell(found: PairedGain, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f} ± {found.stderr:.3f}"


def figure(study: Study, results: dict[str, Any], configs: dict[str, Config]) -> bytes:
    """The README's figure (PNG): accuracies with standard errors, beside real and generated images."""
    from dpt_ray.report.study_figure import StudyPoint, study_figure
    from dpt_ray.stages.graph import flow
    from dpt_ray.stages.report import picture_rows

    name = _name(configs)
    points = []
    for per_class in study.labels_per_class:
        values = _values(study, results, name, per_class)
        for method in (PROBE, METHODS["self_training"], METHODS["augmented"], DPT):
            found = spread(values[method], None)
            points.append(StudyPoint(per_class, SHORT[method], found.mean, found.stderr))
    config = next(iter(configs.values()))
    store, nodes = runs.open_store(config), flow(config)
    pictures = picture_rows(nodes["index"].artifact(store), nodes["samples"].artifact(store), 4)
    return study_figure(points, pictures[:10])
