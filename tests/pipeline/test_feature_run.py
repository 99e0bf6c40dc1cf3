"""A run that generates features, end to end, on the artifacts of a finished run of images."""

import json
from dataclasses import replace

import pytest

from dpt_ray.commands.best_classifier import best_classifier

TINY = (
    "ladder={rungs: [balanced_self_training]}",
    "feature_diffusion={steps: 20, width: 16, batch_size: 32}",
)
NEW = {
    *("balanced_self_training", "ladder", "feature_denoiser", "feature_samples", "generated_features"),
    *("pilot", "evaluation", "report"),
}


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """The same run with features beside the images, then with features alone; what each of them made."""
    both = finished.copy_to(tmp_path_factory.mktemp("features"), *TINY, "generate_in=both")
    made = {"both": set(both.make())}
    alone = replace(both, overrides=(*both.overrides, "generate_in=features", "name=alone"))
    made["features"] = set(alone.make())
    return both, alone, made


def result(run, name):
    return json.loads((run.output / "runs" / name / "evaluation.json").read_text())


def test_only_what_is_new_is_made(runs):
    *_, made = runs
    assert made == {"both": NEW, "features": {"sweep", "evaluation", "report"}}


def test_both_have_gains_of_images_and_of_features(runs):
    found = result(runs[0], "digits")
    pairs = [(gain["improved"], gain["baseline"]) for gain in found["gains"]]
    assert pairs == [
        ("dpt", "probe"),
        ("dpt", "tuned_probe"),
        ("dpt", "balanced_self_training"),
        ("dpt", "generated_features"),
        ("generated_features", "probe"),
        ("generated_features", "tuned_probe"),
        ("generated_features", "balanced_self_training"),
    ]
    assert found["gain"]["improved"] == "dpt"
    assert [row["method"] for row in found["ladder"]] == [
        *("probe", "balanced_self_training", "generated_features", "dpt"),
    ]


def test_features_alone_are_measured_beside_the_controls(runs):
    found = result(runs[1], "alone")
    assert [row["method"] for row in found["accuracy"]] == [
        *("probe", "balanced_self_training", "generated_features", "tuned_probe", "same_labels", "augmented"),
    ]
    assert (found["gain"]["improved"], found["gain"]["baseline"]) == ("generated_features", "tuned_probe")
    assert found["frechet"] == []
    features = {row["method"]: row["test"] for row in result(runs[0], "digits")["accuracy"]}
    assert found["accuracy"][2]["test"] == features["generated_features"]


def test_the_runs_folder_has_the_pilot_and_a_classifier(runs):
    shown = runs[1].output / "runs"
    for name in ("digits", "alone"):
        assert json.loads((shown / name / "pilot.json").read_text())["ladder"][-1]["over_balanced"]
        assert (shown / name / "classifier").resolve().is_dir()
    assert "Feature denoiser loss" in (shown / "alone" / "report.html").read_text()
    assert not (shown / "alone" / "denoiser").exists()
    _, choice = best_classifier(runs[1].config)
    assert choice.among == 6
