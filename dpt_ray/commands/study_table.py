"""The page and the figure of a study from the results of its runs; draws are nested in encoder seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Literal

from dpt_ray.config import Config
from dpt_ray.config.study import Study, reference_name, run_name
from dpt_ray.config.sweep import Sweep
from dpt_ray.evaluation.methods import BALANCED, METHODS, ON_GENERATED_IMAGES, key_of, method_key
from dpt_ray.evaluation.paired import PairedGain, binomial_stderr, paired_gain
from dpt_ray.evaluation.records import MetricRow, StudyResult, StudyRun
from dpt_ray.pipeline.output import open_store
from dpt_ray.report.study_page import (
    Choice,
    Comparison,
    Distances,
    LadderRow,
    Row,
    StudyPage,
    Table,
    TestError,
    VariantDistance,
    VariantRow,
    Variants,
    render_study,
)

# The two forms of DPT; the one chosen on validation comes first.
DPT = ("dpt", "dpt_paper")
OTHERS = tuple(method for method in METHODS if method not in ON_GENERATED_IMAGES)
# The methods that generate or train the encoder, whose gains over all others are shown.
TITLES = {
    "dpt": "DPT, chosen on validation",
    "dpt_paper": "DPT, the paper's setting",
    "semi_supervised_dpt": "the semi-supervised learner with generated images",
    "semi_supervised": "the semi-supervised learner",
    "generated_features": "generated features",
}
PER_CLASS = "labels per class"

# The columns that the rows of a table of distances usually have in common.
Compared = Literal["n_generated", "n_reference", "reference", "extractor", "resize"]

# The values of one method or distance by (encoder seed, draw).
Values = dict[tuple[int, int], float]


@dataclass(frozen=True)
class RunResult:
    """The results of a run that a study shows: test accuracy by method, and Frechet distances.

    `gain` is (improved, baseline, standard error over test images) of DPT's gain in this run.
    `extractor` is the artifact of the encoder in whose features distances are measured. `chosen` says of the
    ladder's methods on what they chose.
    """

    test: dict[str, float]
    n_test: int
    n_validation: int
    gain: tuple[str, str, float] | None
    frechet: list[MetricRow]
    extractor: str
    chosen: dict[str, str]

    @classmethod
    def read(cls, stored: StudyRun) -> RunResult:
        """Return the results of a run in `study.json`."""
        rows, artifacts = stored["accuracy"], stored["artifacts"]
        gain = stored.get("gain")
        return cls(
            test={method_key(row): row["test"] for row in rows if row["test"] is not None},
            n_test=rows[0]["n_test"],
            n_validation=rows[0]["n_validation"],
            gain=gain and (key_of(gain["improved"]), key_of(gain["baseline"]), gain["stderr"]),
            frechet=stored["frechet"],
            extractor=artifacts.get("referee", artifacts["encoder"]),
            chosen={row["method"]: row["chosen_on"] for row in stored.get("ladder", ())},
        )


@dataclass(frozen=True)
class Results:
    """The results of all runs of a study."""

    study: Study
    name: str
    by_name: dict[str, RunResult]

    @classmethod
    def read(cls, study: Study, name: str, stored: Mapping[str, StudyRun]) -> Results:
        """Return the results from "runs" of `study.json`."""
        return cls(study, name, {run: RunResult.read(result) for run, result in stored.items()})

    @cached_property
    def some(self) -> RunResult:
        """The first run of the base; all runs of the base have its methods."""
        return next(iter(self.by_name.values()))

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The methods of the base's runs, in the order of the columns."""
        return tuple(method for method in METHODS if method in self.some.test)

    @cached_property
    def one_extractor(self) -> bool:
        """Whether all runs measure distances with the same weights; otherwise they are not comparable."""
        return len({result.extractor for result in self.by_name.values()}) == 1

    def of(self, per_class: int, variant: str = "") -> dict[tuple[int, int], RunResult]:
        """Return the runs with `per_class` labels by (encoder seed, draw)."""
        return {
            (seed, draw): self.by_name[run_name(self.name, per_class, seed, draw, variant)]
            for seed in self.study.encoder_seeds
            for draw in range(self.study.draws)
        }

    def accuracies(self, per_class: int, variant: str = "") -> dict[str, Values]:
        """Return the test accuracies by method, of those that all runs have."""
        found = self.of(per_class, variant)
        methods = [method for method in METHODS if all(method in run.test for run in found.values())]
        return {method: {at: run.test[method] for at, run in found.items()} for method in methods}

    def distances(self, per_class: int, variant: str = "") -> Values:
        """Return the Frechet distances, empty where there are none or they are not comparable."""
        found = self.of(per_class, variant)
        return {
            at: run.frechet[0]["value"] for at, run in found.items() if run.frechet and self.one_extractor
        }


def spread(values: Values, less: Values | None = None) -> PairedGain:
    """Return mean and standard error of values (minus `less`, paired), draws nested in encoder seeds."""
    return paired_gain(
        [(seed, draw, v - (less[seed, draw] if less else 0)) for (seed, draw), v in values.items()]
    )


def table(study: Study, summary: StudyResult, name: str, sweep: Sweep) -> str:
    """Return the study as Markdown. `summary` is what `study.json` holds, `sweep` the runs' grid."""
    results = Results.read(study, name, summary["runs"])
    tested = results.some.gain
    return render_study(
        StudyPage(
            name=name,
            command=summary["command"],
            seconds=summary["seconds"],
            code=summary["code"],
            n_test=results.some.n_test,
            seeds=len(study.encoder_seeds),
            draws=study.draws,
            choice=_choice(results, sweep),
            cross_validated="cross-validation" in results.some.chosen.values(),
            accuracies=_accuracies(results),
            ladder=tuple(_ladder(results)),
            test_errors=tuple(_test_error(results, per_class) for per_class in study.labels_per_class),
            tested_gain=tested and (METHODS[tested[0]].short, METHODS[tested[1]].short),
            gains=tuple(_comparison(results, method) for method in TITLES if method in results.methods),
            distances=_distances(results) if results.one_extractor else None,
            several_extractors=bool(results.some.frechet) and not results.one_extractor,
            variants=_variants(results) if study.variants else None,
        )
    )


def _choice(results: Results, sweep: Sweep) -> Choice | None:
    """Return what was chosen on validation images; None where nothing was."""
    methods, chosen = set(results.methods), results.some.chosen
    swept = "DPT and its controls" if "dpt" in methods else "the controls of generation"
    if not {"dpt", "augmented"} & methods:
        swept = ""
    # Without a ladder it is the sweep's.
    tuned = "tuned_probe" in methods and chosen.get("tuned_probe", "validation") == "validation"
    others = {method for method, on in chosen.items() if on == "validation"}
    ladder = bool(others - {"tuned_probe", *ON_GENERATED_IMAGES})
    if not results.some.n_validation or not (swept or tuned or ladder):
        return None
    return Choice(
        results.some.n_validation,
        swept,
        tuned,
        ladder,
        sweep.images_per_class,
        sweep.real_weight,
        sweep.l2,
        tuple("none" if least is None else least for least in sweep.min_confidence) if sweep.filters else (),
        tuple(other.name for other in sweep.generate),
        sweep.seeds,
    )


def _accuracies(results: Results) -> Table:
    rows = []
    for per_class in results.study.labels_per_class:
        values = results.accuracies(per_class)
        rows.append(Row(str(per_class), tuple(spread(values[method]) for method in results.methods)))
    return Table((PER_CLASS, *(METHODS[method].short for method in results.methods)), tuple(rows))


def _ladder(results: Results) -> list[LadderRow]:
    """Return every method at each number of labels beside the free control; none without the control."""
    if BALANCED not in results.methods:
        return []
    rows = []
    for per_class in results.study.labels_per_class:
        values = results.accuracies(per_class)
        for method in results.methods:
            over = [
                None if method == other else spread(values[method], values[other])
                for other in ("probe", BALANCED)
            ]
            rows.append(LadderRow(per_class, METHODS[method].short, spread(values[method]), *over))
    return rows


def _test_error(results: Results, per_class: int) -> TestError:
    gains = [run.gain[2] for run in results.of(per_class).values() if run.gain]
    probe = fmean(results.accuracies(per_class)["probe"].values())
    error = binomial_stderr(probe, results.some.n_test)
    return TestError(per_class, error, fmean(gains) if gains else None)


def _comparison(results: Results, method: str) -> Comparison:
    """Return the gains of `method` over all others that are not DPT."""
    others = tuple(other for other in OTHERS if other in results.methods and other != method)
    columns = tuple(f"over {'the ' * ('probe' in other)}{METHODS[other].short}" for other in others)
    over_all, by_seed = [], []
    for per_class in results.study.labels_per_class:
        values = results.accuracies(per_class)
        gains = tuple(spread(values[method], values[other]) for other in others)
        over_all.append(Row(str(per_class), gains))
        for seed in results.study.encoder_seeds:
            mine = {at: value for at, value in values[method].items() if at[0] == seed}
            by_seed.append(
                Row(f"{per_class}, seed {seed}", tuple(spread(mine, values[other]) for other in others))
            )
    several = len(results.study.encoder_seeds) > 1
    return Comparison(
        TITLES[method],
        Table((PER_CLASS, *columns), tuple(over_all)),
        Table((f"{PER_CLASS}, encoder seed", *columns), tuple(by_seed)) if several else None,
    )


def _distances(results: Results) -> Distances | None:
    """Return Frechet distances of the base, of the reference denoisers and of real to real images."""
    study = results.study
    # The first two rows of a run are the referee's, if it has one: generated and real images.
    rows = [row for result in results.by_name.values() for row in result.frechet[:2]]
    if not rows:
        return None
    found = [
        Row(f"{per_class} label{'s' * (per_class > 1)} per class", (spread(values),))
        for per_class in study.labels_per_class
        if (values := results.distances(per_class))
    ]
    words = {"none": "no labels (unconditional)", "true_labels": "all true labels"}
    for condition in study.references:
        runs_of = {
            seed: results.by_name[reference_name(results.name, condition, seed)]
            for seed in study.encoder_seeds
        }
        values = {(seed, 0): run.frechet[0]["value"] for seed, run in runs_of.items() if run.frechet}
        if values:
            found.append(Row(words[condition], (spread(values),)))
    return Distances(
        n_generated=_each(rows, "n_generated"),
        n_reference=_each(rows, "n_reference"),
        reference=_each(rows, "reference"),
        extractor=_each(rows, "extractor"),
        resize=_each(rows, "resize"),
        table=Table(("denoiser", "distance"), tuple(found)),
        floor=fmean(result.frechet[1]["value"] for result in results.by_name.values() if result.frechet),
    )


def _each(rows: list[MetricRow], key: Compared) -> str:
    """Return the distinct values of a column, joined by "or"."""
    return " or ".join(str(value) for value in dict.fromkeys(row[key] for row in rows))


def _variants(results: Results) -> Variants:
    """Return what the variants change, and what it does to accuracies and Frechet distances."""
    rows: list[VariantRow] = []
    distances: list[VariantDistance] = []
    for per_class, variant in product(results.study.labels_per_class, results.study.variants):
        rows += _variant(results, per_class, variant)
        base, changed = results.distances(per_class), results.distances(per_class, variant)
        if base and changed:
            found = (spread(changed), spread(base), spread(changed, base))
            distances.append(VariantDistance(per_class, variant, *found))
    changes = {variant: json.dumps(change) for variant, change in results.study.variants.items()}
    return Variants(changes, tuple(rows), tuple(distances))


def _variant(results: Results, per_class: int, variant: str) -> list[VariantRow]:
    """Return the methods whose accuracy a variant changes in any run, beside the base."""
    base, changed = results.accuracies(per_class), results.accuracies(per_class, variant)
    return [
        VariantRow(
            per_class,
            variant,
            METHODS[method].short,
            top1=spread(values),
            of_base=spread(base[method]),
            over_base=spread(values, base[method]),
        )
        for method, values in changed.items()
        if method in base and values != base[method]
    ]


def figure(study: Study, stored: Mapping[str, StudyRun], base: Config, name: str) -> bytes:
    """Return the README's figure (PNG): accuracies with standard errors, and real and generated images.

    With a ladder it has the gains over the probe instead; where no images are generated, more real ones.
    """
    from dpt_ray.pipeline.flow import flow
    from dpt_ray.report.picture_rows import picture_rows, real_rows
    from dpt_ray.report.study_figure import Baseline, StudyPoint, study_figure

    results = Results.read(study, name, stored)
    points, probe = [], {}
    over_probe = BALANCED in results.methods
    for per_class in study.labels_per_class:
        accuracies = results.accuracies(per_class)
        probe[per_class] = fmean(accuracies["probe"].values())
        for method, values in accuracies.items():
            if not over_probe or method != "probe":
                found = spread(values, accuracies["probe"] if over_probe else None)
                points.append(StudyPoint(per_class, METHODS[method].short, found.mean, found.stderr))
    store, nodes = open_store(base), flow(base)
    index = nodes["index"].artifact(store)
    if "samples" in nodes:
        pictures = picture_rows(index, nodes["samples"].artifact(store), 4)
    else:
        pictures = real_rows(index, base.data.image_size, 8)
    return study_figure(points, pictures[:10], Baseline("probe", probe) if over_probe else None)
