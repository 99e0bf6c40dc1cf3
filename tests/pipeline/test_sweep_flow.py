"""What the sweep of stage 3 tries, and with which filters."""

from dpt_ray.config import load_config
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.sweep import SweepSettings, grid, trial_key
from tests.helpers.identities import changed
from tests.helpers.paths import DIGITS


def test_the_controls_choose_the_probes_penalty_from_the_configured_one_and_three_decades_below():
    def sweep(*overrides):
        return flow(load_config(DIGITS, overrides))["sweep"].hashed

    assert sweep()["probe_l2"] == [2.5e-3, 2.5e-4, 2.5e-5, 2.5e-6]
    assert sweep("classifier.l2=1.0")["probe_l2"] == [1.0, 0.1, 0.01, 0.001]
    assert "probe_l2" not in sweep("evaluate.controls=false")


def test_the_probe_has_trials_only_where_there_are_validation_images():
    settings = SweepSettings(images_per_class=(4,), l2=(0.1,), probe_l2=(0.1, 0.01))
    inputs = ("index", "features", "labels", "sample_features", "samples")
    chosen = [(trial["method"], trial["l2"]) for trial in grid(settings, inputs, choosing=True)]
    assert chosen == [("probe", 0.1), ("probe", 0.01), ("generated", 0.1)]
    assert [trial["method"] for trial in grid(settings, inputs, choosing=False)] == ["generated"]


def test_a_filter_is_tried_on_generated_images_alone_under_names_of_its_own():
    settings = SweepSettings(images_per_class=(4,), l2=(0.1,), min_confidence=(None, 0.0, 0.5))
    inputs = ("index", "features", "labels", "sample_features", "augmented_features", "pseudo_labels")
    trials = grid(settings, inputs, choosing=False)
    assert [(trial["method"], trial.get("min_confidence")) for trial in trials] == [
        *(("generated", least) for least in (None, 0.0, 0.5)),
        ("augmented", None),
        ("self_training", None),
    ]
    assert [trial_key(trial) for trial in trials[:3]] == [
        "generated-k4-w1.0-l0.1",
        "generated-k4-w1.0-l0.1-c0",
        "generated-k4-w1.0-l0.1-c0.5",
    ]


def test_a_filter_is_of_the_classifier_that_made_the_pseudo_labels():
    def judges(node, *overrides):
        inputs = flow(load_config(DIGITS, overrides))[node].inputs
        return [inputs[name].name for name in ("judge", "judge_labels") if name in inputs]

    assert judges("retrained") == judges("sweep") == []
    assert judges("retrained", "retrain.min_confidence=0") == ["classifier", "pseudo_labels"]
    assert judges("sweep", "retrain.min_confidence=0", "sweep=null") == ["classifier", "pseudo_labels"]
    assert judges("retrained", "sweep.min_confidence=[null, 0.5]") == []
    best = ("sweep.min_confidence=[null, 0.5]", "ladder={}", "labels_from=best")
    assert judges("sweep", *best) == ["best", "best"]
    assert judges("sweep", "sweep.min_confidence=[0.5]", "generate_in=features") == []
    assert changed("retrain.min_confidence=0.5") == {"retrained", "evaluation", "report"}
