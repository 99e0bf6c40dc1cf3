"""The tables and the figure of a study: means and standard errors, draws nested in encoder seeds."""

from __future__ import annotations

import json
from typing import Any

from dpt_ray.config import Config, Study, reference_name, run_name
from dpt_ray.evaluation.paired import PairedGain, paired_gain
from dpt_ray.stages import runs
from dpt_ray.stages.evaluate import METHODS, PAPER
from dpt_ray.stages.probe import PROBE

DPT = METHODS["generated"]
SHORT = {
    PROBE: "probe",
    METHODS["probe"]: "tuned probe",
    METHODS["self_training"]: "self-training",
    METHODS["augmented"]: "augmentation",
    DPT: "DPT",
    PAPER: "DPT, paper's setting",
}
FRECHET = "frechet"

# Of one method or distance, by (encoder seed, draw).
Values = dict[tuple[int, int], float]


def _values(
    study: Study, results: dict[str, Any], name: str, per_class: int, variant: str = ""
) -> dict[str, Values]:
    """Test accuracy by method and (encoder seed, draw); Frechet distances under FRECHET."""
    found: dict[str, Values] = {}
    for seed in study.encoder_seeds:
        for draw in range(study.draws):
            result = results[run_name(name, per_class, seed, draw, variant)]
            for row in result["accuracy"]:
                found.setdefault(row["name"], {})[seed, draw] = row["test"]
            for row in result["frechet"][:1]:
                found.setdefault(FRECHET, {})[seed, draw] = row["value"]
    return found


def spread(values: Values, less: Values | None = None) -> PairedGain:
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
        "| labels per class | over the probe | over the tuned probe | over self-training | over augmentation |",
        "|---|---|---|---|---|",
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
        cells = [_cell(spread(values[method])) for method in SHORT]
        lines.append(f"| {per_class} | " + " | ".join(cells) + " |")
        others = (PROBE, METHODS["probe"], METHODS["self_training"], METHODS["augmented"])
        found = [spread(values[DPT], values[other]) for other in others]
        cells = [f"{_cell(gain, '+')} ({gain.positive}/{gain.total})" for gain in found]
        gains.append(f"| {per_class} | " + " | ".join(cells) + " |")
        if FRECHET in values:
            frechet.append(f"| {per_class} labels per class | {_cell(spread(values[FRECHET]))} |")
    frechet += _references(study, results, name)
    return "\n".join(lines + gains + frechet + _variants(study, results, name)) + "\n"


def _variants(study: Study, results: dict[str, Any], name: str) -> list[str]:
    """A table of the base and the variants for each number of labels; differences are run by run."""
    if not study.variants:
        return []
    lines = [
        "",
        "Variants, each less the base on the same encoder, labels and noise; DPT chosen on validation, "
        "accuracies in points, Frechet distance lower is better:",
        "",
        "| labels per class | variant | DPT | over its probe | over the base | Frechet | over the base |",
        "|---|---|---|---|---|---|---|",
    ]
    for per_class in study.labels_per_class:
        base = _values(study, results, name, per_class)
        for variant in ("", *study.variants):
            values = _values(study, results, name, per_class, variant)
            cells = [_points(spread(values[DPT]))]
            cells += [_points(spread(values[DPT], values[PROBE]), "+")]
            gain = spread(values[DPT], base[DPT])
            cells += [f"{_points(gain, '+')} ({gain.positive}/{gain.total})" if variant else ""]
            if FRECHET in values:
                cells += [_cell(spread(values[FRECHET]))]
                cells += [_cell(spread(values[FRECHET], base[FRECHET]), "+") if variant else ""]
            lines.append(f"| {per_class} | {variant or 'base'} | " + " | ".join(cells) + " |")
    lines += ["", "What a variant changes:", ""]
    for variant, changes in study.variants.items():
        lines.append(f"- {variant}: `{json.dumps(changes)}`")
    return lines


def _points(found: PairedGain, sign: str = "") -> str:
    return f"{100 * found.mean:{sign}.2f} ± {100 * found.stderr:.2f}"


def _references(study: Study, results: dict[str, Any], name: str) -> list[str]:
    """Rows of the unconditional and fully labelled denoisers, and of real against real images."""
    rows = []
    words = {"none": "no labels (unconditional)", "true_labels": "all true labels"}
    for condition in study.references:
        found = [results[reference_name(name, condition, seed)] for seed in study.encoder_seeds]
        values = {
            (seed, 0): r["frechet"][0]["value"]
            for seed, r in zip(study.encoder_seeds, found, strict=True)
            if r["frechet"]
        }
        if values:
            rows.append(f"| {words[condition]} | {_cell(spread(values))} |")
    floor = next(iter(results.values()))["frechet"]
    if floor:
        rows.append(f"| real training images (floor) | {floor[1]['value']:.3f} |")
    return rows


def _cell(found: PairedGain, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f} ± {found.stderr:.3f}"


def figure(study: Study, results: dict[str, Any], base: Config, name: str) -> bytes:
    """The README's figure (PNG): accuracies with standard errors, beside real and generated images."""
    from dpt_ray.report.study_figure import StudyPoint, study_figure
    from dpt_ray.stages.graph import flow
    from dpt_ray.stages.report import picture_rows

    points = []
    for per_class in study.labels_per_class:
        values = _values(study, results, name, per_class)
        for method in (PROBE, METHODS["probe"], METHODS["self_training"], METHODS["augmented"], DPT):
            found = spread(values[method])
            points.append(StudyPoint(per_class, SHORT[method], found.mean, found.stderr))
    store, nodes = runs.open_store(base), flow(base)
    pictures = picture_rows(nodes["index"].artifact(store), nodes["samples"].artifact(store), 4)
    return study_figure(points, pictures[:10])
