"""What a sweep chose, as a table and as a configuration to run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from dpt_ray.cluster.trials import run_trials
from dpt_ray.commands.sweep_table import sweep_table
from dpt_ray.config import load_config
from dpt_ray.data.shards import read_features
from dpt_ray.evaluation.records import read_evaluation
from dpt_ray.pipeline.best_setting import best_config
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.sweep import trial_key
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.runs import make
from tests.helpers.tables import row


def trial(method, top1, l2=0.0025, **more):
    return {"shard": f"{method}-{l2}", "method": method, "validation_top1": top1, "l2": l2} | {
        "images_per_class": 16,
        "real_weight": 1.0,
        **more,
    }


def text(table):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_best_of_each_method_is_shown_with_its_error_and_its_ties():
    generated = [trial("generated", top1, l2) for top1, l2 in ((0.8, 1), (0.75, 2), (0.5, 3))]
    probe = [trial("probe", 0.6, images_per_class=None)]
    sweep = {
        "trials": [*generated, *probe],
        "chosen": {"generated": generated[0], "probe": probe[0]},
        "n_validation": 64,
    }
    shown = text(sweep_table(sweep))
    # sqrt(0.8 x 0.2 / 64) = 0.05: 0.75 is just as good
    assert row(shown, "DPT, chosen on validation")[1:] == [
        "16",
        "1.0",
        "1",
        "0.800 +- 0.050",
        "1 of 2 others",
    ]
    assert row(shown, "Linear probe, l2 chosen on validation")[1] == "-"
    assert "call it a tie" in shown


def test_with_several_seeds_the_mean_has_its_error_over_them_and_ties_are_counted_with_that_of_the_images():
    first = [trial("generated", top1, l2) for top1, l2 in ((0.85, 1), (0.8, 2), (0.7, 3))]
    again = [trial("generated", top1, l2, seed=1) for top1, l2 in ((0.75, 1), (0.7, 2), (0.7, 3))]
    probe = [trial("probe", 0.6, images_per_class=None)]
    sweep = {
        "trials": [*first, *again, *probe],
        "chosen": {"generated": first[0], "probe": probe[0]},
        "n_validation": 64,
    }
    shown = text(sweep_table(sweep))
    assert "4 settings, 7 trials" in shown and "mean of 2 seeds" in shown
    # Over the seeds (0.85 - 0.75) / 2 = 0.05, over the images sqrt(0.8 x 0.2 / 64) = 0.05, both 0.0707: 0.75
    # is as good, 0.7 is not.
    assert row(shown, "DPT, chosen on validation")[3:] == [
        "1",
        "0.800 +- 0.050",
        "0.071",
        "1 of 2 others",
    ]
    # sqrt(0.6 x 0.4 / 64)
    assert row(shown, "Linear probe, l2 chosen on validation")[4:] == ["0.600", "0.061", "0 of 0 others"]


def test_without_validation_images_nothing_is_called_good():
    only = trial("generated", None)
    shown = text(sweep_table({"trials": [only], "chosen": {"generated": only}, "n_validation": 0}))
    assert row(shown, "DPT, chosen on validation")[4:] == ["-", "-"]


def test_the_chosen_setting_is_a_configuration_that_makes_no_more_than_its_classifier(finished, tmp_path):
    run = finished.copy_to(tmp_path, "sweep.real_weight=[0.5]", "sweep.max_iterations=7")
    run.make("sweep")
    file = tmp_path / "runs" / "digits" / "best.yaml"
    best = load_config(file)
    chosen = run.artifact("sweep").manifest["chosen"]["generated"]
    assert best.name == "digits-best" and best.sweep is None
    assert (best.retrain.images_per_class, best.retrain.real_weight, best.retrain.l2) == (
        chosen["images_per_class"],
        0.5,
        chosen["l2"],
    )
    assert make(best, "retrained") == ["retrained"]
    classifier = flow(best)["retrained"].artifact(Store(best.output)).local_file("model.safetensors")
    swept = run.artifact("sweep").local_file("generated/model.safetensors")
    weights, expected = (load_file(path) for path in (classifier, swept))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value)


def test_generated_images_that_the_probe_does_not_agree_with_are_left_out(finished, tmp_path):
    run = finished.copy_to(
        tmp_path,
        "sweep.min_confidence=[null, 0.3]",
        "retrain.min_confidence=0.3",
        "generate.images_per_class=32",
    )
    run.make("evaluation")
    trials = {
        trial.get("min_confidence"): trial
        for trial in run.artifact("sweep").manifest["trials"]
        if trial["method"] == "generated"
    }
    # Independently: softmax by hand of the row-normalised features, and a count by class.
    ids, features = read_features(run.artifact("sample_features"))
    features = features - features.mean(axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    W = load_file(run.artifact("classifier").local_file("model.safetensors"))["weight"]
    scores = np.exp(features @ W.T / run.artifact("pseudo_labels").manifest["calibration"]["temperature"])
    p = scores / scores.sum(axis=1, keepdims=True)
    label = np.array([int(identifier.split("-")[1]) for identifier in ids.to_pylist()])
    passing = label[(p.argmax(axis=1) == label) & (p.max(axis=1) >= 0.3)]
    kept = np.minimum(np.bincount(passing, minlength=10), 16).sum()
    labelled = trials[None]["labelled"]
    assert 0 < kept < 160
    assert (trials[None]["rows"], trials[0.3]["rows"]) == (labelled + 160, labelled + kept)
    assert run.artifact("retrained").manifest["rows"] == labelled + kept
    notes = {row["method"]: row["note"] for row in read_evaluation(run.artifact("evaluation"))["accuracy"]}
    assert notes["dpt_paper"] == "16 images per class, confidence >= 0.3, real weight 1.0"


def test_each_set_of_images_is_swept_and_the_trials_are_for_tensorboard_too(finished, tmp_path):
    run = finished.copy_to(
        tmp_path, "sweep.generate=[{guidance: 3.0}]", "sweep.l2=[0.0025]", "evaluate.controls=false"
    )
    run.make("sweep")
    sweep = run.artifact("sweep")
    of_base, of_other = sorted(sweep.manifest["trials"], key=lambda trial: trial.get("samples", ""))
    assert "samples" not in of_base and of_other["samples"] == "guidance=3"
    assert of_base["rows"] == of_other["rows"] and of_base["objective"] != of_other["objective"]
    assert pq.read_table(sweep.local_file("trials.parquet"))["samples"].to_pylist() == [None, "guidance=3"]
    events = Path(sweep.path("tensorboard"))
    assert {path.parent.name for path in events.rglob("*tfevents*")} == {
        *("tensorboard", of_base["shard"], of_other["shard"]),
    }


def test_another_seed_is_another_set_of_images_and_the_first_ones_trials_are_taken_over(
    finished, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finished.copy_to(tmp_path, "sweep.seeds=2")
    tried = []

    def watched(name, trials, *others):
        tried.extend(trial_key(trial) for trial in trials)
        return run_trials(name, trials, *others)

    monkeypatch.setattr("dpt_ray.stages.sweep.run_trials", watched)
    run.make("report")
    sweep, earlier = run.artifact("sweep"), finished.artifact("sweep")
    old = {trial["shard"]: trial for trial in earlier.manifest["trials"]}
    trials = {trial["shard"]: trial for trial in sweep.manifest["trials"]}
    new = trials.keys() - old.keys()
    assert sweep.uri.rpartition("/")[2] != earlier.uri.rpartition("/")[2]  # another identity
    # Of the images with seed 1 alone, each beside that of the first seed.
    assert (
        sorted(tried)
        == sorted(new)
        == sorted(f"{key}-seed=1" for key in old if key.startswith(("generated", "augmented")))
    )
    for key, entry in old.items():
        assert {**trials[key], "file": ""} == {**entry, "file": ""}
    for key in new:
        assert trials[key]["seed"] == 1
        assert trials[key]["objective"] != old[key.removesuffix("-seed=1")]["objective"]
    # Each setting's mean, by pandas; the classifier and best.yaml are of the first seed.
    table = pq.read_table(sweep.local_file("trials.parquet")).to_pandas()
    means = table[table.method == "generated"].groupby(["images_per_class", "real_weight", "l2"])
    chosen = sweep.manifest["chosen"]["generated"]
    both = [trials[key]["validation_top1"] for key in (chosen["shard"], f"{chosen['shard']}-seed=1")]
    assert "seed" not in chosen
    assert means.validation_top1.mean().max() == pytest.approx(np.mean(both))
    shown = EventAccumulator(str(Path(sweep.path("tensorboard")) / f"{chosen['shard']}-seed=1")).Reload()
    # The standard error of two values is half their difference.
    for tag, value in (("mean_top1", np.mean(both)), ("mean_top1_stderr", abs(both[0] - both[1]) / 2)):
        assert shown.Scalars(tag)[0].value == pytest.approx(value)
    best = load_config(tmp_path / "runs" / "digits" / "best.yaml")
    assert best.generate.seed == run.config.generate.seed
    assert flow(best)["samples"].reference == run.nodes()["samples"].reference
    weights, expected = (
        load_file(sweep.local_file(file)) for file in ("generated/model.safetensors", chosen["file"])
    )
    np.testing.assert_array_equal(weights["weight"], expected["weight"])
    page = (tmp_path / "runs" / "digits" / "report.html").read_text()
    assert "the mean over 2 seeds" in page
    notes = {row["method"]: row["note"] for row in read_evaluation(run.artifact("evaluation"))["accuracy"]}
    told = {method for method, note in notes.items() if note.endswith(", the first of 2 seeds")}
    assert told == {"augmented", "dpt"} < notes.keys()


def test_the_best_configuration_samples_the_set_that_was_chosen():
    chosen = {"images_per_class": 32, "real_weight": 1.0, "l2": 0.0025, "samples": "guidance=3"}
    config = load_config(DIGITS, ["sweep.generate=[{guidance: 3.0}]"])
    best = best_config(config, SimpleNamespace(manifest={"chosen": {"generated": chosen}}))
    assert best.generate.guidance == 3.0 and best.sweep is None
    assert flow(best)["samples"].reference == flow(config)["samples:guidance=3"].reference


def test_a_setting_that_is_not_chosen_any_more_is_forgotten(finished, tmp_path):
    run = finished.copy_to(tmp_path, "sweep=null")
    file = tmp_path / "runs" / "digits" / "best.yaml"
    assert file.exists()
    run.make("probe")
    assert not file.exists()
