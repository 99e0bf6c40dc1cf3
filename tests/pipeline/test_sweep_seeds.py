"""Several seeds of a sweep: the sets of images, the trials, and what is chosen over them."""

import math

import numpy as np
import pytest
from scipy.stats import sem

from dpt_ray.config import ConfigError, load_config
from dpt_ray.config.sections import Compute
from dpt_ray.evaluation.swept import Swept, best, by_setting
from dpt_ray.pipeline.cost import costs
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.evaluation import _seconds
from dpt_ray.stages.sweep import SweepSettings, grid, trial_key
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.toy import task_of

OTHER = "sweep.generate=[{guidance: 1.5}]"
SEEDS = "sweep.seeds=3"
INPUTS = ("sample_features", "augmented_features", "pseudo_labels")
NAMES = ("seed=6", "seed=7", "guidance=1.5,seed=6", "guidance=1.5,seed=7")


def references(*overrides):
    return {name: node.reference for name, node in flow(load_config(DIGITS, overrides)).items()}


def test_each_set_of_images_is_sampled_with_the_seed_of_the_run_and_the_next_ones():
    base = (OTHER, "generate.seed=5")
    before, after = references(*base), references(*base, SEEDS)
    assert after.keys() - before.keys() == {
        *(f"{kind}:{name}" for kind in ("samples", "sample_features") for name in NAMES),
        *(f"{kind}:{name}" for kind in ("augmented", "augmented_features") for name in NAMES[:2]),
    }
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"sweep", "evaluation", "report"}
    # The same images as those of a run with this seed in the first place.
    other = references("generate.seed=7", "generate.guidance=1.5")
    for kind in ("samples", "sample_features"):
        assert after[f"{kind}:guidance=1.5,seed=7"] == other[kind]
    for kind in ("augmented", "augmented_features"):
        assert after[f"{kind}:seed=7"] == other[kind]


def test_the_sweep_reads_all_sets_of_which_it_has_trials():
    node = flow(load_config(DIGITS, [OTHER, SEEDS]))["sweep"]
    tried = {
        (trial["method"], trial_key(trial).partition("-l0.0025")[2].removeprefix("-"))
        for trial in grid(node.settings, node.inputs, choosing=True)
        if trial["method"] in ("generated", "augmented") and trial["l2"] == 0.0025
    }
    names = {"generated": "sample_features", "augmented": "augmented_features"}
    read = {f"{names[method]}:{images}".rstrip(":") for method, images in tried}
    assert read == {name for name in node.inputs if name.startswith(tuple(names.values()))}


def test_the_report_tells_what_every_set_of_images_took():
    nodes = flow(load_config(DIGITS, [OTHER, SEEDS]))
    of_sets = {name for name in nodes if ":" in name}
    assert of_sets and of_sets <= nodes["report"].inputs.keys()


def test_the_time_of_the_chosen_setting_is_that_of_every_set_of_images(tmp_path):
    node, store = flow(load_config(DIGITS, [OTHER, SEEDS]))["evaluation"], Store(str(tmp_path))
    sets = {key: source.artifact(store) for key, source in node.inputs.items() if key.startswith("samples")}
    for samples in sets.values():
        samples.publish({"seconds": 2.0})
    task = task_of(node, store, Compute(), sets)
    assert (_seconds(task, "dpt"), _seconds(task, "dpt_paper")) == (12.0, 2.0)


def test_one_seed_is_no_other_sweep_than_without_the_setting():
    assert references("sweep.seeds=1") == references()


def test_a_repetition_is_not_a_competitor_although_the_images_are_the_same():
    competitor, repetition = references("sweep.generate=[{seed: 1}]"), references("sweep.seeds=2")
    assert competitor["samples:seed=1"] == repetition["samples:seed=1"]
    alone = ("evaluate.controls=false",)
    assert (
        references("sweep.generate=[{seed: 1}]", *alone)["sweep"]
        != references("sweep.seeds=2", *alone)["sweep"]
    )


def test_every_setting_on_images_has_a_trial_for_each_seed_and_that_of_the_first_keeps_its_name():
    lists = {"images_per_class": (4,), "l2": (0.1,), "probe_l2": (0.1,), "generate": [{"guidance": 2.0}]}
    once = grid(SweepSettings(**lists), INPUTS, choosing=True)
    trials = grid(SweepSettings(**lists, seeds=2, further_seeds=(1,)), INPUTS, choosing=True)
    names = [trial_key(trial) for trial in trials]
    assert names == [
        "probe-kNone-w1.0-l0.1",
        "generated-k4-w1.0-l0.1",
        "generated-k4-w1.0-l0.1-guidance=2",
        "generated-k4-w1.0-l0.1-seed=1",
        "generated-k4-w1.0-l0.1-guidance=2,seed=1",
        "augmented-k4-w1.0-l0.1",
        "augmented-k4-w1.0-l0.1-seed=1",
        "self_training-kNone-w1.0-l0.1",
    ]
    assert [trial for trial in trials if "seed" not in trial] == once


def test_settings_are_drawn_and_not_seeds():
    lists = {"images_per_class": (4, 8, 16), "l2": (0.1, 0.2, 0.4), "trials": 4}
    once = grid(SweepSettings(**lists), INPUTS, choosing=False)
    trials = grid(SweepSettings(**lists, seeds=3, further_seeds=(1, 2)), INPUTS, choosing=False)
    assert [trial for trial in trials if "seed" not in trial] == once
    for method in ("generated", "augmented"):
        for seed in (1, 2):
            again = [trial for trial in trials if trial["method"] == method and trial.get("seed") == seed]
            assert [{**trial, "seed": seed} for trial in once if trial["method"] == method] == again


def test_the_cost_has_every_set_and_every_trial():
    images = {"train": 1000, "validation": 200, "test": 600}
    found = {
        seeds: costs(load_config(DIGITS, [OTHER, f"sweep.seeds={seeds}"]), images, 10) for seeds in (1, 3)
    }
    made = {seeds: set(found[seeds]) for seeds in found}
    nodes = {seeds: flow(load_config(DIGITS, [OTHER, f"sweep.seeds={seeds}"])).keys() for seeds in found}
    assert made[3] - made[1] == nodes[3] - nodes[1]
    assert found[3]["samples:guidance=1.5,seed=2"] == found[1]["samples:guidance=1.5"]
    assert found[3]["augmented_features:seed=1"] == found[1]["augmented_features"]
    # 12 settings on each of two sets of generated images and on augmented ones; 4 probes, 4 self-trainings.
    assert (found[1]["sweep"].rows, found[3]["sweep"].rows) == (36 + 8, 3 * 36 + 8)


@pytest.mark.parametrize("seed", [1, 9])
def test_a_set_with_a_seed_of_its_own_is_one_line_naming_the_key(seed):
    sets = f"sweep.generate=[{{guidance: 1.5}}, {{guidance: 2.0, seed: {seed}}}]"
    assert load_config(DIGITS, [sets]).sweep.generate[1].seed == seed
    with pytest.raises(ConfigError, match=rf"sweep.generate.1.seed {seed}: with sweep.seeds") as error:
        load_config(DIGITS, [sets, SEEDS])
    assert "\n" not in str(error.value)


def trial(top1, nll=1.0, seed=None, **setting):
    found = {"method": "generated", "images_per_class": 16, "real_weight": 1.0, "l2": 0.1} | setting
    found |= {"validation_top1": top1, "validation_nll": nll}
    return found if seed is None else found | {"seed": seed}


def test_the_mean_over_the_seeds_decides_and_the_mean_cross_entropy_where_they_are_the_same():
    lucky = [trial(0.9), trial(0.5, seed=1)]
    steady = [trial(0.75, l2=1.0), trial(0.75, seed=1, l2=1.0)]
    sure = [trial(0.625, nll=0.5, l2=2.0), trial(0.875, nll=1.25, seed=1, l2=2.0)]
    found = best([lucky[0], steady[0], sure[0], lucky[1], steady[1], sure[1]])
    assert found.trials == tuple(sure)  # mean 0.75 as the steady one, cross-entropy 0.875 below 1
    assert best([*lucky, *steady]).first == steady[0]


def test_sets_that_are_sampled_otherwise_are_settings_of_their_own():
    trials = [trial(0.5), trial(0.5, samples="guidance=2"), trial(0.6, seed=1)]
    assert [len(setting.trials) for setting in by_setting(trials)] == [2, 1]


def test_the_error_over_seeds_is_the_standard_error_of_the_mean():
    values = [0.8, 0.7, 0.75]
    found = Swept(tuple(trial(value, seed=seed) for seed, value in enumerate(values)))
    assert found.top1 == pytest.approx(np.mean(values))
    assert found.stderr == pytest.approx(sem(values))
    one = Swept((trial(0.8),))
    assert one.stderr is None and one.error(64) == pytest.approx(math.sqrt(0.8 * 0.2 / 64))


def test_the_error_in_all_is_that_of_new_images_and_new_seeds():
    # Images of a difficulty and seeds of a quality of their own: the spread of the mean over many sweeps.
    random = np.random.default_rng(0)
    n, seeds, times = 100, 3, 4000
    difficulty = random.beta(3, 1, size=(times, 1, n))
    quality = random.normal(0, 0.04, size=(times, seeds, 1))
    right = random.random((times, seeds, n)) < np.clip(difficulty + quality, 0, 1)
    accuracies = right.mean(axis=2)
    said = [Swept(tuple(trial(float(value)) for value in row)).error(n) for row in accuracies]
    spread = accuracies.mean(axis=1).std()
    over_seeds = [Swept(tuple(trial(float(value)) for value in row)).stderr for row in accuracies]
    # Without the images it would be too small; with them it is a little too large.
    assert np.sqrt(np.mean(np.square(over_seeds))) < 0.9 * spread
    assert spread < np.sqrt(np.mean(np.square(said))) < 1.5 * spread
