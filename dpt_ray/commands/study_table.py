"""The tables and the figure of a study: means and standard errors, draws nested in encoder seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import fmean
from typing import Any

from dpt_ray.config import Config
from dpt_ray.config.study import Study, reference_name, run_name
from dpt_ray.evaluation.paired import PairedGain, half_interval, paired_gain
from dpt_ray.pipeline import run as runs
from dpt_ray.stages.evaluation import METHODS, PAPER
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
PROBES = (PROBE, METHODS["probe"])
FRECHET = "frechet"

# Of one method or distance, by (encoder seed, draw).
Values = dict[tuple[int, int], float]


def table(study: Study, summary: dict[str, Any], name: str) -> str:
    """The study as Markdown."""
    results = summary["runs"]
    lines = [
        f"# {name}",
        "",
        f"`{summary['command']}`; {summary['seconds']} s; code {summary['code']}.",
        "",
        _what_the_numbers_are(study, results),
        "",
        *_accuracies(study, results, name),
        *_gains(study, results, name),
        *_distances(study, results, name),
        *_variants(study, results, name),
    ]
    return "\n".join(lines) + "\n"


def spread(values: Values, less: Values | None = None) -> PairedGain:
    """Mean and standard error of values (less others, paired), draws nested in encoder seeds."""
    return paired_gain(
        [(seed, draw, v - (less[seed, draw] if less else 0)) for (seed, draw), v in values.items()]
    )


def _values(
    study: Study, results: dict[str, Any], name: str, per_class: int, variant: str = ""
) -> dict[str, Values]:
    """Test accuracy by method and (encoder seed, draw); Frechet distances, if comparable, under FRECHET."""
    found: dict[str, Values] = {}
    comparable = _one_extractor(results)
    for seed in study.encoder_seeds:
        for draw in range(study.draws):
            result = results[run_name(name, per_class, seed, draw, variant)]
            for row in result["accuracy"]:
                found.setdefault(row["name"], {})[seed, draw] = row["test"]
            if comparable and result["frechet"]:
                found.setdefault(FRECHET, {})[seed, draw] = result["frechet"][0]["value"]
    return found


def _one_extractor(results: dict[str, Any]) -> bool:
    """Whether all runs measure with the same weights: the referee's where there is one, or the encoder's."""
    used = [result["artifacts"] for result in results.values()]
    return len({artifacts.get("referee", artifacts["encoder"]) for artifacts in used}) == 1


def _methods(results: dict[str, Any]) -> list[str]:
    """The methods that the base's runs have, in the order of the columns."""
    there = {row["name"] for row in next(iter(results.values()))["accuracy"]}
    return [method for method in SHORT if method in there]


def _dpt(values: dict[str, Values]) -> str | None:
    """DPT as chosen on validation, or as configured where nothing was chosen, or not at all."""
    return next((method for method in (DPT, PAPER) if method in values), None)


def _what_the_numbers_are(study: Study, results: dict[str, Any]) -> str:
    seeds, draws = len(study.encoder_seeds), study.draws
    some = next(iter(results.values()))["accuracy"][0]
    text = f"Top-1 on {some['n_test']} test images, "
    if seeds * draws == 1:
        text += "one run each, without a standard error. "
    else:
        over = f"{seeds} encoder seeds" if seeds > 1 else f"{draws} label draws of one encoder"
        free = (seeds if seeds > 1 else draws) - 1
        text += (
            f"mean over {seeds * draws} runs ({seeds} encoder seed{'s' * (seeds > 1)} x {draws} label "
            f"draw{'s' * (draws > 1)}, nested) ± standard error over {over}, {free} "
            f"degree{'s' * (free > 1)} of freedom; a 95 % interval is ± {half_interval(free):.1f} of them. "
        )
    if some["n_validation"] and set(_methods(results)) - {PROBE, PAPER}:
        text += (
            f"Methods that have settings to choose chose them on {some['n_validation']} labelled validation "
            "images."
        )
    return text.rstrip()


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _header(*cells: str) -> list[str]:
    return [_row(*cells), "|---" * len(cells) + "|"]


def _accuracies(study: Study, results: dict[str, Any], name: str) -> list[str]:
    methods = _methods(results)
    lines = _header("labels per class", *(SHORT[method] for method in methods))
    for per_class in study.labels_per_class:
        values = _values(study, results, name, per_class)
        lines.append(_row(per_class, *(_cell(spread(values[method])) for method in methods)))
    return lines


def _gains(study: Study, results: dict[str, Any], name: str) -> list[str]:
    methods = _methods(results)
    others = [method for method in methods if method not in (DPT, PAPER)]
    lines: list[str] = []
    for per_class in study.labels_per_class:
        values = _values(study, results, name, per_class)
        if dpt := _dpt(values):
            found = [spread(values[dpt], values[other]) for other in others]
            lines.append(_row(per_class, *(_gain(gain) for gain in found)))
    if not lines:
        return []
    chosen = "chosen on validation" if DPT in methods else "the paper's setting"
    return [
        "",
        f"Paired gains of DPT ({chosen}), and how many of the runs are above 0:",
        "",
        *_header("labels per class", *(f"over {'the ' * (o in PROBES)}{SHORT[o]}" for o in others)),
        *lines,
    ]


def _distances(study: Study, results: dict[str, Any], name: str) -> list[str]:
    """Frechet distances of the base, of the reference denoisers and of real against real images."""
    # The first two rows of a run are of the referee, where there is one: generated and real images.
    rows = [row for result in results.values() for row in result["frechet"][:2]]
    if not rows:
        return []
    if not _one_extractor(results):
        return [
            "",
            "Frechet distances are left out: the runs have them in the features of different networks, which "
            "do not compare. `evaluate.referee` gives all runs the same.",
        ]
    lines = [
        "",
        f"Frechet distance (lower is better) of {_each(rows, 'n_generated')} images to "
        f"{_each(rows, 'n_reference')} {_each(rows, 'reference')}, in the features of "
        f"{_each(rows, 'extractor')}; resize: {_each(rows, 'resize')}.",
        "",
        *_header("denoiser", "distance"),
    ]
    for per_class in study.labels_per_class:
        values = _values(study, results, name, per_class)
        if FRECHET in values:
            lines.append(_row(f"{per_class} labels per class", _cell(spread(values[FRECHET]))))
    words = {"none": "no labels (unconditional)", "true_labels": "all true labels"}
    for condition in study.references:
        found = {
            seed: results[reference_name(name, condition, seed)]["frechet"] for seed in study.encoder_seeds
        }
        distances: Values = {(seed, 0): rows[0]["value"] for seed, rows in found.items() if rows}
        if distances:
            lines.append(_row(words[condition], _cell(spread(distances))))
    floor = fmean(result["frechet"][1]["value"] for result in results.values() if result["frechet"])
    return [*lines, _row("real training images (floor)", f"{floor:.3f}")]


def _each(rows: list[dict[str, Any]], key: str) -> str:
    """The value that all rows have, or each of those that some have."""
    return " or ".join(str(value) for value in dict.fromkeys(row[key] for row in rows))


def _variants(study: Study, results: dict[str, Any], name: str) -> list[str]:
    """A table of the base and the variants for each number of labels; differences are run by run."""
    if not study.variants:
        return []
    base = {per_class: _values(study, results, name, per_class) for per_class in study.labels_per_class}
    distances = any(FRECHET in values for values in base.values())
    columns = ["labels per class", "variant", "DPT", "over its probe", "over the base"]
    lines = [
        "",
        "Variants, each less the base on the same encoder, labels and noise; accuracies in points"
        + (", Frechet distance lower is better:" if distances else ":"),
        "",
        *_header(*columns, *(["Frechet", "over the base"] if distances else [])),
    ]
    for per_class in study.labels_per_class:
        for variant in ("", *study.variants):
            values = _values(study, results, name, per_class, variant)
            cells = _variant_cells(values, base[per_class] if variant else None)
            lines.append(_row(per_class, variant or "base", *cells[: 5 if distances else 3]))
    lines += ["", "What a variant changes:", ""]
    for variant, changes in study.variants.items():
        lines.append(f"- {variant}: `{json.dumps(changes)}`")
    return lines


def _variant_cells(values: dict[str, Values], base: dict[str, Values] | None) -> list[str]:
    """DPT, less its probe, less the base's; the distance, and less the base's; blank what there is not."""
    cells = [""] * 5
    dpt = _dpt(values)
    if dpt:
        cells[:2] = _points(spread(values[dpt])), _points(spread(values[dpt], values[PROBE]), "+")
    if dpt and base and dpt in base:
        cells[2] = _gain(spread(values[dpt], base[dpt]), _points)
    if FRECHET in values:
        cells[3] = _cell(spread(values[FRECHET]))
    if FRECHET in values and base and FRECHET in base:
        cells[4] = _cell(spread(values[FRECHET], base[FRECHET]), "+")
    return cells


def _cell(found: PairedGain, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f}" + (f" ± {found.stderr:.3f}" if found.stderr is not None else "")


def _points(found: PairedGain, sign: str = "") -> str:
    return f"{100 * found.mean:{sign}.2f}" + (
        f" ± {100 * found.stderr:.2f}" if found.stderr is not None else ""
    )


def _gain(found: PairedGain, shown: Callable[[PairedGain, str], str] = _cell) -> str:
    return f"{shown(found, '+')} ({found.positive}/{found.total})"


def figure(study: Study, results: dict[str, Any], base: Config, name: str) -> bytes:
    """The README's figure (PNG): accuracies with standard errors, beside real and generated images."""
    from dpt_ray.pipeline.flow import flow
    from dpt_ray.report.study_figure import StudyPoint, study_figure
    from dpt_ray.stages.report import picture_rows

    points = []
    for per_class in study.labels_per_class:
        values = _values(study, results, name, per_class)
        shown = [method for method in _methods(results) if method != PAPER or DPT not in values]
        for method in shown:
            found = spread(values[method])
            points.append(StudyPoint(per_class, SHORT[method], found.mean, found.stderr))
    store, nodes = runs.open_store(base), flow(base)
    pictures = picture_rows(nodes["index"].artifact(store), nodes["samples"].artifact(store), 4)
    return study_figure(points, pictures[:10])
