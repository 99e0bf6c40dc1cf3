"""The tables of a study: means, paired differences and standard errors by hand."""

from dpt_ray.config import Study, run_name
from dpt_ray.stages.evaluate import METHODS, PAPER
from dpt_ray.stages.probe import PROBE
from dpt_ray.stages.study_table import table

# Test accuracy of the probe, of DPT in the base and in the variant, and the two Frechet distances, by
# (encoder seed, draw). The probe does not depend on the variant.
MADE_UP = {
    (0, 0): (0.90, 0.91, 0.93, 0.30, 0.20),
    (0, 1): (0.90, 0.93, 0.93, 0.30, 0.24),
    (5, 0): (0.92, 0.92, 0.96, 0.40, 0.30),
    (5, 1): (0.94, 0.96, 0.98, 0.40, 0.30),
}


def result(probe, dpt, frechet):
    names = {PROBE: probe, METHODS["generated"]: dpt, PAPER: 0.5}
    names |= {METHODS["probe"]: 0.8, METHODS["self_training"]: 0.6, METHODS["augmented"]: 0.7}
    rows = [
        {"name": name, "test": value, "n_test": 600, "n_validation": 200} for name, value in names.items()
    ]
    distances = [{"value": value, "extractor": "the referee"} for value in (frechet, 0.077)]
    return {"accuracy": rows, "frechet": distances}


def made_up():
    runs = {}
    for (seed, draw), (probe, base, variant, near, far) in MADE_UP.items():
        runs[run_name("s", 1, seed, draw)] = result(probe, base, near)
        runs[run_name("s", 1, seed, draw, "v")] = result(probe, variant, far)
    return {"command": "dpt study x.yaml", "seconds": 1, "code": "abc", "runs": runs}


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
        "| 1 | 0.915 ± 0.015 | 0.800 ± 0.000 | 0.600 ± 0.000 | 0.700 ± 0.000 | 0.930 ± 0.010 | 0.500 ± 0.000 |"
        in text
    )
    assert "| 1 | +0.015 ± 0.005 (3/4) | +0.130 ± 0.010 (4/4) | +0.330 ± 0.010 (4/4) |" in text
    assert "| real training images (floor) | 0.077 |" in text
    assert "ariant" not in text
