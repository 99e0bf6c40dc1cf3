"""What the sweep of stage 3 tries, and with which filters."""

import pytest

from dpt_ray.config import ConfigError, load_config
from dpt_ray.pipeline.cost import costs
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.sweep import SweepSettings, _same, grid, trial_key
from tests.helpers.identities import changed
from tests.helpers.paths import DIGITS


def test_the_controls_choose_the_probes_penalty_from_the_configured_one_and_three_decades_below():
    def sweep(*overrides):
        return flow(load_config(DIGITS, overrides))["sweep"].hashed

    assert sweep()["probe_l2"] == [2.5e-3, 2.5e-4, 2.5e-5, 2.5e-6]
    assert sweep("classifier.l2=1.0")["probe_l2"] == [1.0, 0.1, 0.01, 0.001]
    assert "probe_l2" not in sweep("evaluate.controls=false")


def test_without_a_sweep_the_controls_have_the_cap_of_stage_3():
    nodes = flow(load_config(DIGITS, ["sweep=null", "retrain.max_iterations=100"]))
    assert nodes["sweep"].settings.max_iterations == nodes["retrained"].settings.max_iterations == 100
    assert "max_iterations" not in flow(load_config(DIGITS, ["sweep=null"]))["sweep"].hashed


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


OTHERS = "sweep.generate=[{guidance: 1.5}, {guidance: 2.0, nfe: 50}]"


def test_other_sets_of_images_are_sampled_from_the_same_denoiser_and_tried_besides():
    before, after = flow(load_config(DIGITS)), flow(load_config(DIGITS, [OTHERS]))
    names = ("guidance=1.5", "guidance=2,nfe=50")
    assert after.keys() - before.keys() == {
        f"{kind}:{name}" for kind in ("samples", "sample_features") for name in names
    }
    changed = {name for name in before if before[name].reference != after[name].reference}
    assert changed == {"sweep", "evaluation", "report"}
    sampled = after["samples:guidance=2,nfe=50"]
    assert sampled.inputs == after["samples"].inputs
    assert (sampled.settings.guidance, sampled.settings.nfe) == (2.0, 50)
    # The same images as those of a run that samples so in the first place.
    other = flow(load_config(DIGITS, ["generate.guidance=2.0", "generate.nfe=50"]))
    for kind in ("samples", "sample_features"):
        assert after[f"{kind}:guidance=2,nfe=50"].reference == other[kind].reference


def test_each_set_of_images_is_tried_with_each_filter_and_the_controls_once():
    sets = {"generate": [{"guidance": 2.0}]}
    settings = SweepSettings(images_per_class=(4,), l2=(0.1,), min_confidence=(None, 0.5), **sets)
    inputs = ("sample_features", "augmented_features")
    trials = grid(settings, inputs, choosing=False)
    assert [trial_key(trial) for trial in trials] == [
        "generated-k4-w1.0-l0.1",
        "generated-k4-w1.0-l0.1-c0.5",
        "generated-k4-w1.0-l0.1-guidance=2",
        "generated-k4-w1.0-l0.1-c0.5-guidance=2",
        "augmented-k4-w1.0-l0.1",
    ]


def test_the_trials_on_one_set_of_images_follow_each_other_so_that_a_process_reads_it_once():
    others = [{"guidance": 2.0}, {"guidance": 3.0}]
    settings = SweepSettings(images_per_class=(4, 8), l2=(0.1, 0.2), generate=others)
    sets = [trial.get("samples") for trial in grid(settings, ("sample_features",), choosing=False)]
    assert sets == [*[None] * 4, *["guidance=2"] * 4, *["guidance=3"] * 4]


def test_trials_are_drawn_at_random_from_the_grid_of_each_method_and_more_of_them_add_to_those():
    lists = {"images_per_class": (4, 8, 16), "real_weight": (1.0, "balanced"), "l2": (0.1, 0.2, 0.4)}
    inputs = ("sample_features", "augmented_features", "pseudo_labels")
    whole = grid(SweepSettings(**lists), inputs, choosing=False)
    few, more, all_of_them = (
        grid(SweepSettings(**lists, trials=count), inputs, choosing=False) for count in (3, 7, 18)
    )
    for trials, count in ((few, 3), (more, 7)):
        for method, most in (("generated", 18), ("augmented", 18), ("self_training", 6)):
            assert sum(trial["method"] == method for trial in trials) == min(count, most)
    assert all(trial in more for trial in few) and all_of_them == whole
    assert [whole.index(trial) for trial in more] == sorted(whole.index(trial) for trial in more)
    # The controls try what the generated images try.
    settings = [
        [{**trial, "method": ""} for trial in few if trial["method"] == m] for m in ("generated", "augmented")
    ]
    assert settings[0] == settings[1]


def test_a_trial_on_the_first_images_is_taken_over_when_there_are_more_and_a_filtered_one_is_not():
    trial = {"method": "generated", "images_per_class": 32, "real_weight": 1.0, "l2": 0.1}
    assert _same("features/abc@k128", "features/abc@k256", trial)
    assert not _same("features/abc@k128", "features/abd@k128", trial)
    assert not _same(None, "features/abc@k128", trial)
    filtered = trial | {"min_confidence": 0.5}
    assert _same("features/abc@k128", "features/abc@k128", filtered)
    assert not _same("features/abc@k128", "features/abc@k256", filtered)


def test_the_cost_counts_every_set_of_images():
    def sampled(*overrides):
        found = costs(load_config(DIGITS, overrides), {"train": 1000, "validation": 200, "test": 600}, 10)
        return {name: cost.flops for name, cost in found.items() if name.startswith("samples")}

    one = sampled()["samples"]
    # Guidance 1 takes one pass for each evaluation, any other two.
    assert sampled(OTHERS) == {
        "samples": one,
        "samples:guidance=1.5": 2 * one,
        "samples:guidance=2,nfe=50": 2 * one * 50 / load_config(DIGITS).generate.nfe,
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[{guidance: 1.0}]", r"sweep.generate.0 \(guidance=1\) is sampled as another set"),
        ("[{nfe: 50}, {nfe: 50}]", r"sweep.generate.1 \(nfe=50\) is sampled as another set"),
        ("[{guidance_interval: [0.9, 0.1]}]", r"guidance_interval \(0.9, 0.1\) is empty"),
        ("[{}]", "sweep.generate.0: give at least one of guidance, guidance_interval, solver, nfe, seed"),
        (
            "[{images_per_class: 3}]",
            "sweep.generate.0.images_per_class: 3: unknown key; remove it, or use one of",
        ),
        ("[{guidanc: 3}]", "did you mean sweep.generate.0.guidance?"),
    ],
)
def test_a_set_of_images_that_cannot_be_is_one_line(value, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(DIGITS, [f"sweep.generate={value}"])
    assert "\n" not in str(error.value)


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
