"""What a study's page says of results that are made up, so that every number is worked out by hand."""

import json
import math
import statistics
from pathlib import Path

import pytest

from dpt_ray.commands.study_table import table
from dpt_ray.config.study import Study, load_study, reference_name, run_name
from dpt_ray.config.sweep import Sweep

ROOT = Path(__file__).parents[2]

# Accuracies of the probe, of DPT in the base and in the variant; then their two Frechet distances, by
# (encoder seed, draw). The probe does not depend on the variant.
MADE_UP = {
    (0, 0): (0.90, 0.91, 0.93, 0.30, 0.20),
    (0, 1): (0.90, 0.93, 0.93, 0.30, 0.24),
    (5, 0): (0.92, 0.92, 0.96, 0.40, 0.30),
    (5, 1): (0.94, 0.96, 0.98, 0.40, 0.30),
}
CONTROLS = {"tuned_probe": 0.8, "self_training": 0.6, "augmented": 0.7}
SWEEP = Sweep(images_per_class=(128,), real_weight=(1.0, "balanced"))


def result(accuracies, frechet=None, floor=0.077, n=997, gain_error=None, **artifacts):
    chosen = any(method in CONTROLS or method == "dpt" for method in accuracies)
    rows = [
        {"method": method, "name": "words", "test": value, "n_test": 600, "n_validation": 200 * chosen}
        for method, value in accuracies.items()
    ]
    about = {
        "extractor": "the referee",
        "n_generated": n,
        "n_reference": 600,
        "reference": "real test images",
    }
    gain = {"baseline": "probe", "improved": "dpt", "stderr": gain_error}
    return {
        "accuracy": rows,
        "gain": gain if gain_error else None,
        "frechet": [about | {"value": v, "resize": "none"} for v in (frechet, floor)] if frechet else [],
        "artifacts": {"encoder": "encoder/a", "referee": "encoder/r"} | artifacts,
    }


def with_controls(probe, dpt, frechet, **more):
    return result({"probe": probe, "dpt": dpt, "dpt_paper": 0.5} | CONTROLS, frechet, **more)


def page(study, runs, sweep=SWEEP):
    return table(
        study, {"command": "dpt study x.yaml", "seconds": 1, "code": "abc", "runs": runs}, "s", sweep
    )


def made_up():
    runs = {}
    for (seed, draw), (probe, base, variant, near, far) in MADE_UP.items():
        runs[run_name("s", 1, seed, draw)] = with_controls(probe, base, near)
        runs[run_name("s", 1, seed, draw, "v")] = with_controls(probe, variant, far)
    return runs


def rows(text, names=2):
    """The cells of all tables by their first ones."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    return {tuple(row[:names]): row[names:] for row in cells}


def section(text, title):
    """The lines of the first table below a title."""
    return text.split(f"\n{title}:\n\n", 1)[1].split("\n\n")[0].splitlines()[2:]


def test_a_variant_is_compared_with_the_base_run_by_run_with_draws_nested_in_seeds():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2, variants={"v": {"diffusion": {}}})
    text = page(study, made_up())
    found = rows(text, 3)
    # DPT by seed: 0.92 and 0.94, so 0.93 and sqrt(((0.01^2 + 0.01^2) / 1) / 2) = 0.01. The variant by seed:
    # 0.93 and 0.97; less the base 0.01 and 0.03, three of four above 0.
    assert found["1", "v", "DPT"] == ["95.00 ± 2.00", "93.00 ± 1.00", "+2.00 ± 1.00 (3/4)"]
    assert ("1", "v", "probe") not in found
    # Frechet by seed: 0.22 and 0.30, in the base 0.3 and 0.4, so -0.08 and -0.10.
    assert rows(text)["1", "v"] == ["0.260 ± 0.040", "0.350 ± 0.050", "-0.090 ± 0.010"]
    assert '- v: `{"diffusion": {}}`' in text


def test_a_variant_has_a_row_for_each_method_of_both_that_differs_in_any_run():
    """As of a study of generated features, which has no DPT."""
    variants = {"same": {}, "probe_labels": {"labels_from": "probe"}, "no_ladder": {"ladder": None}}
    study = Study(labels_per_class=(1, 4), encoder_seeds=(0,), draws=2, variants=variants)
    base = {"probe": 0.30, "balanced_self_training": 0.36, "generated_features": 0.40, "augmented": 0.30}
    runs = {run_name("s", n, 0, d, v): result(base) for n in (1, 4) for d in (0, 1) for v in ("", *variants)}
    # One run of two differs: +0.02 and 0 are +0.01 with an error of sqrt(2 * 0.01^2 / 1 / 2) = 0.01.
    runs[run_name("s", 4, 0, 0, "probe_labels")] = result(base | {"generated_features": 0.42})
    for draw, value in enumerate((0.35, 0.31)):
        without = {"probe": 0.30, "self_training": 0.33, "generated_features": value, "augmented": 0.27}
        runs[run_name("s", 1, 0, draw, "no_ladder")] = result(without)
    text = page(study, runs)
    table = text.partition("\nVariants, ")[2].partition("\n|---")[2].partition("\n\n")[0]
    assert table.splitlines()[1:] == [
        "| 1 | no_ladder | generated features | 33.00 ± 2.00 | 40.00 ± 0.00 | -7.00 ± 2.00 (0/2) |",
        "| 1 | no_ladder | augmentation | 27.00 ± 0.00 | 30.00 ± 0.00 | -3.00 ± 0.00 (0/2) |",
        "| 4 | probe_labels | generated features | 41.00 ± 1.00 | 40.00 ± 0.00 | +1.00 ± 1.00 (1/2) |",
    ]
    assert "- same: `{}`" in text and "Frechet" not in text


def test_a_study_without_variants_has_the_table_of_methods_alone():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2)
    text = page(study, made_up())
    assert (
        "| labels per class | probe | tuned probe | self-training | augmentation | DPT | DPT, paper" in text
    )
    cells = "91.50 ± 1.50 | 80.00 ± 0.00 | 60.00 ± 0.00 | 70.00 ± 0.00 | 93.00 ± 1.00 | 50.00 ± 0.00"
    assert f"| 1 | {cells} |" in text
    assert "| over the probe | over the tuned probe | over self-training | over augmentation |" in text
    assert "997 images to 600 real test images, in the features of the referee; resize: none." in text
    assert "ariant" not in text


def test_a_sweep_with_seeds_is_named_and_one_without_is_not():
    study, told = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2), "3 seeds of the images"
    assert told not in page(study, made_up())
    seeds = SWEEP.model_copy(update={"seeds": 3})
    assert f"l2 0.0025, by the mean over {told} (the accuracies are those of the first), the tuned" in page(
        study, made_up(), seeds
    )


def test_the_papers_own_setting_is_compared_beside_the_chosen_one_and_both_by_encoder_seed():
    text = page(Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2), made_up())
    # By seed 0.02 and 0.01 over the probe; 0.12 and 0.14 over the tuned probe; and so on.
    gains = "+1.50 ± 0.50 (3/4) | +13.00 ± 1.00 (4/4) | +33.00 ± 1.00 (4/4) | +23.00 ± 1.00 (4/4)"
    assert section(text, "DPT, chosen on validation") == [f"| 1 | {gains} |"]
    # 0.5 less the probe: -0.40 and -0.43; less the controls the same everywhere.
    gains = "-41.50 ± 1.50 (0/4) | -30.00 ± 0.00 (0/4) | -10.00 ± 0.00 (0/4) | -20.00 ± 0.00 (0/4)"
    assert section(text, "DPT, the paper's setting") == [f"| 1 | {gains} |"]
    by_seed = text.split("The same by encoder seed, ± standard error over its label draws.")[1]
    # Over the probe seed 0 has 0.01 and 0.03, seed 5 has 0.00 and 0.02: errors sqrt(2 * 0.01^2 / 2) = 0.01.
    first, second = section(by_seed, "DPT, chosen on validation")
    assert first.startswith("| 1, seed 0 | +2.00 ± 1.00 (2/2) | +12.00 ± 1.00 (2/2) |")
    assert second.startswith("| 1, seed 5 | +1.00 ± 1.00 (1/2) | +14.00 ± 2.00 (2/2) |")


def test_the_page_says_what_was_chosen_among_and_whose_the_choice_is():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2)
    text = page(study, made_up())
    assert "on 200 labelled validation images" in text and "real weight 1.0, balanced" in text
    assert "`balanced`" in text and "this project's addition" in text
    assert "this project's addition" not in page(study, made_up(), Sweep(images_per_class=(128,)))


def test_a_choice_names_the_sweep_only_where_there_was_one_and_the_ladder_where_it_chose():
    study = Study(labels_per_class=(1,), encoder_seeds=(0,), draws=1)

    def text(chosen_on, **more):
        accuracies = {"probe": 0.3, "tuned_probe": 0.3, "balanced_self_training": 0.36} | more
        rows = [{"method": method, "chosen_on": chosen_on} for method in ("tuned_probe", "propagation")]
        run = result(accuracies) | {"ladder": rows}
        return page(study, {run_name("s", 1, 0, 0): run})

    alone = text("validation", generated_features=0.37)
    assert "200 labelled validation images: the tuned probe among four values" in alone
    assert "and generated features each among four penalties" in alone
    assert "DPT" not in alone and "Real weight" not in alone
    assert "cross-validation" not in alone
    controls = text("cross-validation", augmented=0.3)
    assert "chose their penalty by cross-validation over the few labels" in controls
    assert "validation images: the controls of generation among images per class 128" in controls
    assert "Real weight 1 is" in controls and "four penalties" not in controls
    assert "tuned probe among" not in controls
    assert "validation images" not in text("cross-validation")  # nothing was chosen on them


def test_a_choice_of_a_ladder_without_a_tuned_probe_is_told():
    study = Study(labels_per_class=(1,), encoder_seeds=(0,), draws=1)
    rows = [{"method": "propagation", "chosen_on": "validation"}]
    run = result({"probe": 0.3, "propagation": 0.36, "augmented": 0.3}) | {"ladder": rows}
    shown = page(study, {run_name("s", 1, 0, 0): run})
    assert "100 labelled" not in shown and "200 labelled validation images: the controls of gen" in shown
    assert " and l2 0.0025, the ladder's rungs and generated features each among four penalties" in shown
    assert "tuned probe" not in shown


def test_the_error_of_the_test_set_is_the_binomial_one_and_that_of_a_gain_the_runs_mean():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 1), draws=1)
    runs = {
        run_name("s", 1, seed, 0): with_controls(0.9, 0.91, 0.3, gain_error=error)
        for seed, error in ((0, 0.004), (1, 0.008))
    }
    # sqrt(0.9 * 0.1 / 600) = 0.012247; the mean of 0.004 and 0.008.
    assert "| labels per class | of a top-1 | of a gain |\n|---|---|---|\n| 1 | 1.22 | 0.60 |" in page(
        study, runs
    )


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
        ((7,), 1, "on 600 test images, one run each, without a standard error.\n\nMethods that"),
    ],
)
def test_the_page_says_over_what_its_errors_are(seeds, draws, words):
    study = Study(labels_per_class=(1,), encoder_seeds=seeds, draws=draws)
    runs = {run_name("s", 1, s, d): with_controls(0.9, 0.91, 0.3) for s in seeds for d in range(draws)}
    text = page(study, runs)
    assert words in text
    assert ("±" in text) == (len(runs) > 1)
    assert ("by encoder seed" in text) == (len(seeds) > 1)


@pytest.mark.parametrize(
    ("draws", "probe", "gain"),
    [(1, "90.00", "+1.00 (1/1)"), (2, "90.00 ± 0.00", "+2.00 ± 1.00 (2/2)")],
)
def test_a_single_value_has_no_error(draws, probe, gain):
    study = Study(labels_per_class=(1,), encoder_seeds=(4,), draws=draws, references=("none",))
    runs = {run_name("s", 1, 4, d): with_controls(0.9, 0.91 + 0.02 * d, 0.3) for d in range(draws)}
    runs[reference_name("s", "none", 4)] = result({"probe": 0.9}, 0.35)
    found = rows(page(study, runs))
    assert {("1", probe), ("1", gain), ("no labels (unconditional)", "0.350")} <= found.keys()


@pytest.mark.parametrize(
    ("accuracies", "header", "gains"),
    [
        ({"probe": 0.9, "dpt_paper": 0.95}, "| probe | DPT, paper's setting |", "| 1 | +5.00 ± 0.00 (2/2) |"),
        ({"probe": 0.9, "dpt_paper": 0.95, "dpt": 0.94}, "| probe | DPT | DPT, paper", "| 1 | +4.00"),
        ({"probe": 0.9}, "| labels per class | probe |\n", None),
    ],
)
def test_the_columns_are_the_methods_that_there_are(accuracies, header, gains):
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 1), draws=1, variants={"v": {"generate": {}}})
    runs = {run_name("s", 1, seed, 0, v): result(accuracies) for seed in (0, 1) for v in ("", "v")}
    text = page(study, runs)
    assert header in text and "Frechet" not in text
    assert ("chose them" in text) == ("dpt" in accuracies)
    assert gains in text if gains else "Paired gains" not in text


def test_a_ladder_has_every_method_beside_the_probe_and_the_free_control():
    study = Study(labels_per_class=(1, 4), encoder_seeds=(0,), draws=2)
    runs = {
        run_name("s", n, 0, draw): result(
            {"probe": 0.3 + draw / 10, "balanced_self_training": 0.36, "propagation": 0.4 + n / 100}
        )
        for n in (1, 4)
        for draw in (0, 1)
    }
    found = rows(page(study, runs))
    # The probe has 0.30 and 0.40, propagation 0.44 at 4 labels, by draw 0.14 and 0.04 above it.
    assert found["4", "probe"] == ["35.00 ± 5.00", "", "-1.00 ± 5.00 (1/2)"]
    assert found["4", "propagation"] == ["44.00 ± 0.00", "+9.00 ± 5.00 (2/2)", "+8.00 ± 0.00 (2/2)"]
    assert found["1", "balanced self-training"] == ["36.00 ± 0.00", "+1.00 ± 5.00 (1/2)", ""]
    assert "The ladder" not in page(Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=2), made_up())


def test_generated_features_are_compared_with_all_others_with_and_without_images():
    study = Study(labels_per_class=(1,), draws=2, encoder_seeds=(0,))
    others = {"probe": 0.30, "balanced_self_training": 0.36, "generated_features": 0.37}
    runs = {run_name("s", 1, 0, draw): result(others) for draw in range(2)}
    text = page(study, runs)
    assert "generated features:" in text and "DPT, " not in text.partition("Paired gains")[2]
    assert "| 1 | +7.00 ± 0.00 (2/2) | +1.00 ± 0.00 (2/2) |" in text
    with_images = page(study, {name: result(others | {"dpt": 0.40}) for name in runs})
    assert "over generated features |" in with_images and "over DPT" not in with_images
    assert "| 1 | +10.00 ± 0.00 (2/2) | +4.00 ± 0.00 (2/2) | +3.00 ± 0.00 (2/2) |" in with_images


def test_distances_in_the_features_of_different_encoders_are_not_averaged():
    study = Study(labels_per_class=(1,), encoder_seeds=(0, 5), draws=1)

    def text(*encoders, **referee):
        pairs = zip(study.encoder_seeds, encoders, strict=True)
        runs = {run_name("s", 1, s, 0): with_controls(0.9, 0.91, 0.3, encoder=e, **referee) for s, e in pairs}
        for run in runs.values():
            if not referee:
                del run["artifacts"]["referee"]
        return page(study, runs)

    assert "distances are left out" in text("encoder/a", "encoder/b")
    assert "| 1 label per class | 0.300 ± 0.000 |" not in text("encoder/a", "encoder/b")
    assert "| 1 label per class | 0.300 ± 0.000 |" in text("encoder/a", "encoder/a")
    assert "| 1 label per class | 0.300 ± 0.000 |" in text("encoder/a", "encoder/b", referee="encoder/r")


def test_the_floor_is_the_mean_of_all_runs():
    study = Study(labels_per_class=(1,), encoder_seeds=(0,), draws=2)
    runs = {
        run_name("s", 1, 0, d): with_controls(0.9, 0.91, 0.3, floor=0.07 + 0.02 * d, n=10 + d) for d in (0, 1)
    }
    text = page(study, runs)
    assert "| real training images (floor) | 0.080 |" in text
    assert "of 10 or 11 images" in text


def test_the_committed_page_is_that_of_the_committed_results():
    """With the numbers that were recomputed by hand when the paper's own setting was asked for."""
    study, configs = load_study(ROOT / "configs" / "digits_study.yaml")
    stored = json.loads((ROOT / "docs/results/digits_study.json").read_text())
    text = table(study, stored, "digits-study", next(iter(configs.values())).sweep)
    assert (ROOT / "docs/results/digits_study.md").read_text().startswith(text)
    paper = [line.split(" | ") for line in section(text, "DPT, the paper's setting")]
    assert [line[1][:13] for line in paper] == ["+0.63 ± 0.53 ", "-0.10 ± 0.26 ", "-0.47 ± 0.17 "]
    assert paper[0][4].startswith("-0.89 ± 0.23 ")  # over balanced self-training
    for seed, gain in enumerate(("+1.53", "-0.27", "+1.00")):
        assert f"| 1, seed {seed} | {gain} ± " in text


@pytest.mark.parametrize("name", ["cifar10-lite0-study", "cifar10-lite0-labels-study"])
def test_the_committed_pages_of_cifar10_are_those_of_their_results(name):
    """With one gain worked out from the stored accuracies: mean, and deviation / sqrt(n), of n draws."""
    file = ROOT / "docs/results" / name.replace("-", "_")
    stored = json.loads(file.with_suffix(".json").read_text())
    first = next(iter(load_study(ROOT / "configs/cifar10_study.yaml")[1].values()))
    text = table(Study(**stored["study"]), stored, name, first.sweep)
    assert file.with_suffix(".md").read_text().startswith(text)
    by_draw, draws = [], stored["study"]["draws"]
    for draw in range(draws):
        accuracy = {row["method"]: row["test"] for row in stored["runs"][f"{name}-n4-e0-d{draw}"]["accuracy"]}
        by_draw.append(100 * (accuracy["generated_features"] - accuracy["balanced_self_training"]))
    gain = f"{statistics.mean(by_draw):+.2f} ± {statistics.stdev(by_draw) / math.sqrt(draws):.2f} "
    assert rows(text)["4", "generated features"][2].startswith(gain)
