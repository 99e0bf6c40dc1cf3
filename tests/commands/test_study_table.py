"""The tables of a study: means, paired differences and standard errors by hand."""

import pytest

from dpt_ray.commands.study_table import table
from dpt_ray.config.study import Study, reference_name, run_name
from dpt_ray.stages.evaluation import METHODS, PAPER
from dpt_ray.stages.probe import PROBE

# Test accuracy of the probe, of DPT in the base and in the variant, and the two Frechet distances, by
# (encoder seed, draw). The probe does not depend on the variant.
MADE_UP = {
    (0, 0): (0.90, 0.91, 0.93, 0.30, 0.20),
    (0, 1): (0.90, 0.93, 0.93, 0.30, 0.24),
    (5, 0): (0.92, 0.92, 0.96, 0.40, 0.30),
    (5, 1): (0.94, 0.96, 0.98, 0.40, 0.30),
}
CONTROLS = {METHODS["probe"]: 0.8, METHODS["self_training"]: 0.6, METHODS["augmented"]: 0.7}


def result(accuracies, frechet=None, floor=0.077, n=997, **artifacts):
    chosen = any(name in CONTROLS or name == METHODS["generated"] for name in accuracies)
    rows = [
        {"name": name, "test": value, "n_test": 600, "n_validation": 200 * chosen}
        for name, value in accuracies.items()
    ]
    about = {
        "extractor": "the referee",
        "n_generated": n,
        "n_reference": 600,
        "reference": "real test images",
    }
    distances = [about | {"value": value, "resize": "none"} for value in (frechet, floor)]
    return {
        "accuracy": rows,
        "frechet": distances if frechet else [],
        "artifacts": {"encoder": "encoder/a", "referee": "encoder/r"} | artifacts,
    }


def with_controls(probe, dpt, frechet, **more):
    return result({PROBE: probe, METHODS["generated"]: dpt, PAPER: 0.5} | CONTROLS, frechet, **more)


def summary(runs):
    return {"command": "dpt study x.yaml", "seconds": 1, "code": "abc", "runs": runs}


def made_up():
    runs = {}
    for (seed, draw), (probe, base, variant, near, far) in MADE_UP.items():
        runs[run_name("s", 1, seed, draw)] = with_controls(probe, base, near)
        runs[run_name("s", 1, seed, draw, "v")] = with_controls(probe, variant, far)
    return summary(runs)


def rows(text):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return {tuple(row[:2]): row[2:] for row in cells}


def test_a_variant_is_compared_with_the_base_run_by_run_with_draws_nested_in_seeds():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2, variants={"v": {"diffusion": {}}})
    found = rows(table(study, made_up(), "s"))
    # DPT by seed: 0.92 and 0.94, so 0.93 and sqrt(((0.01^2 + 0.01^2) / 1) / 2) = 0.01.
    # Over the probe by seed: 0.02 and 0.01. Frechet by seed: 0.3 and 0.4.
    assert found["1", "base"] == ["93.00 ± 1.00", "+1.50 ± 0.50", "", "0.350 ± 0.050", ""]
    # The variant by seed: 0.93 and 0.97; less the probe 0.03 and 0.04; less the base 0.01 and 0.03, three of
    # four above 0. Frechet by seed: 0.22 and 0.30, less the base -0.08 and -0.10.
    assert found["1", "v"] == [
        "95.00 ± 2.00",
        "+3.50 ± 0.50",
        "+2.00 ± 1.00 (3/4)",
        "0.260 ± 0.040",
        "-0.090 ± 0.010",
    ]


def test_a_study_without_variants_has_the_table_of_methods_alone():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2)
    text = table(study, made_up(), "s")
    assert (
        "| labels per class | probe | tuned probe | self-training | augmentation | DPT | DPT, paper" in text
    )
    cells = "0.915 ± 0.015 | 0.800 ± 0.000 | 0.600 ± 0.000 | 0.700 ± 0.000 | 0.930 ± 0.010 | 0.500 ± 0.000"
    assert f"| 1 | {cells} |" in text
    assert "| over the probe | over the tuned probe | over self-training | over augmentation |" in text
    assert "| 1 | +0.015 ± 0.005 (3/4) | +0.130 ± 0.010 (4/4) | +0.330 ± 0.010 (4/4) |" in text
    assert "997 images to 600 real test images, in the features of the referee; resize: none." in text
    assert "ariant" not in text


@pytest.mark.parametrize(
    ("seeds", "draws", "words"),
    [
        # Student's t at 97.5 %, from a printed table: 12.706, 4.303 and 2.776 with 1, 2 and 4 degrees.
        (
            (0, 5),
            2,
            "± standard error over 2 encoder seeds, 1 degree of freedom; a 95 % interval is ± 12.7 of",
        ),
        ((0, 1, 2), 1, "over 3 encoder seeds, 2 degrees of freedom; a 95 % interval is ± 4.3 of them"),
        (
            (7,),
            5,
            "over 5 label draws of one encoder, 4 degrees of freedom; a 95 % interval is ± 2.8 of them",
        ),
        ((7,), 1, "Top-1 on 600 test images, one run each, without a standard error. Methods that"),
    ],
)
def test_the_table_says_over_what_its_errors_are(seeds, draws, words):
    study = Study(labels_per_class=(1,), encoder_seeds=seeds, draws=draws)
    runs = {run_name("s", 1, s, d): with_controls(0.9, 0.91, 0.3) for s in seeds for d in range(draws)}
    text = table(study, summary(runs), "s")
    assert words in text
    assert ("±" in text) == (len(runs) > 1)


@pytest.mark.parametrize(
    ("draws", "probe", "gain"),
    [(1, "0.900", "+0.010 (1/1)"), (2, "0.900 ± 0.000", "+0.020 ± 0.010 (2/2)")],
)
def test_a_single_value_has_no_error(draws, probe, gain):
    study = Study(labels_per_class=(1,), encoder_seeds=(4,), draws=draws, references=("none",))
    runs = {run_name("s", 1, 4, d): with_controls(0.9, 0.91 + 0.02 * d, 0.3) for d in range(draws)}
    runs[reference_name("s", "none", 4)] = result({PROBE: 0.9}, 0.35)
    found = rows(table(study, summary(runs), "s"))
    assert {("1", probe), ("1", gain), ("no labels (unconditional)", "0.350")} <= found.keys()


@pytest.mark.parametrize(
    ("accuracies", "header", "gains"),
    [
        ({PROBE: 0.9, PAPER: 0.95}, "| probe | DPT, paper's setting |", "| 1 | +0.050 ± 0.000 (2/2) |"),
        ({PROBE: 0.9, PAPER: 0.95, METHODS["generated"]: 0.94}, "| probe | DPT | DPT, paper", "| 1 | +0.040"),
        ({PROBE: 0.9}, "| labels per class | probe |\n", None),
    ],
)
def test_the_columns_are_the_methods_that_there_are(accuracies, header, gains):
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 1), draws=1, variants={"v": {"generate": {}}})
    runs = {run_name("s", 1, seed, 0, v): result(accuracies) for seed in (0, 1) for v in ("", "v")}
    text = table(study, summary(runs), "s")
    assert header in text and "Frechet" not in text
    assert ("chose them" in text) == (METHODS["generated"] in accuracies)
    assert gains in text if gains else "Paired gains" not in text


def test_distances_in_the_features_of_different_encoders_are_not_averaged():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=1)

    def text(*encoders, **referee):
        pairs = zip(study.encoder_seeds, encoders, strict=True)
        runs = {run_name("s", 1, s, 0): with_controls(0.9, 0.91, 0.3, encoder=e, **referee) for s, e in pairs}
        for run in runs.values():
            if not referee:
                del run["artifacts"]["referee"]
        return table(study, summary(runs), "s")

    assert "distances are left out" in text("encoder/a", "encoder/b")
    assert "| 1 labels per class | 0.300 ± 0.000 |" not in text("encoder/a", "encoder/b")
    assert "| 1 labels per class | 0.300 ± 0.000 |" in text("encoder/a", "encoder/a")
    assert "| 1 labels per class | 0.300 ± 0.000 |" in text("encoder/a", "encoder/b", referee="encoder/r")


def test_the_floor_is_the_mean_of_all_runs():
    study = Study(labels_per_class=(1,), encoder_seeds=(0,), draws=2)
    runs = {
        run_name("s", 1, 0, d): with_controls(0.9, 0.91, 0.3, floor=0.07 + 0.02 * d, n=10 + d) for d in (0, 1)
    }
    text = table(study, summary(runs), "s")
    assert "| real training images (floor) | 0.080 |" in text
    assert "of 10 or 11 images" in text
