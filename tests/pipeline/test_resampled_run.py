"""A run whose generated images are sampled again until the classifier takes them for their class."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.shards import read_columns, read_features, read_images
from dpt_ray.pipeline.cost import costs
from dpt_ray.pipeline.flow import flow
from tests.helpers.paths import DIGITS
from tests.helpers.tiny_run import shard_files

LEAST, ATTEMPTS = 0.2, 3
RESAMPLE = f"generate.resample={{min_confidence: {LEAST}, attempts: {ATTEMPTS}}}"


def test_nothing_but_what_is_made_of_the_images_is_another_artifact():
    before, after = flow(load_config(DIGITS)), flow(load_config(DIGITS, [RESAMPLE]))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].reference != after[name].reference}
    assert {"samples", "sample_features", "retrained", "sweep", "evaluation", "report"} <= changed
    assert changed.isdisjoint({"denoiser", "classifier", "pseudo_labels", "augmented", "features"})
    judges = {key: node.name for key, node in after["samples"].inputs.items()}
    assert (judges["encoder"], judges["judge"]) == ("encoder", "classifier")


def test_the_classifier_of_the_pseudo_labels_decides():
    told = ("ladder={}", "labels_from=propagation", RESAMPLE)
    inputs = flow(load_config(DIGITS, told))["samples"].inputs
    assert inputs["judge"].name == inputs["judge_labels"].name == "propagation"


def test_the_plan_has_the_most_that_it_can_cost():
    counts = {"train": 100}
    once, again = (costs(load_config(DIGITS, told), counts, 10) for told in ((), (RESAMPLE,)))
    assert again["samples"].transformer == ATTEMPTS * once["samples"].transformer
    assert again["samples"].conv > once["samples"].conv  # the encoder's
    assert again["sample_features"] == once["sample_features"]


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (("generate.resample={min_confidence: 2}",), "generate.resample.min_confidence"),
        (("generate.resample={min_confidence: 0, attempts: 1}",), "generate.resample.attempts"),
        (("generate.resample={attempts: 3}",), "generate.resample.min_confidence"),
        ((RESAMPLE, "generate_in=features"), "generate.resample judges generated images of a class"),
        ((RESAMPLE, "diffusion.condition=none"), "generate.resample judges generated images of a class"),
    ],
)
def test_what_cannot_be_judged_is_refused(told, error):
    with pytest.raises(ConfigError, match=error) as caught:
        load_config(DIGITS, told)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture(scope="module")
def resampled(finished, tmp_path_factory):
    """The tiny run with other samples, of which the denoiser was made before."""
    run = finished.copy_to(tmp_path_factory.mktemp("resampled"), RESAMPLE, "compute.threads=2")
    run.make("report")
    return run


def images(run):
    """The file of each image by its id."""
    found = {}
    for table in read_images(run.artifact("samples")):
        found |= dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
    return found


def told(run):
    """(class, index, attempt, passes) of each image by its id."""
    table = read_columns(run.artifact("samples"), ["id", "class", "index", "attempt", "passes"])
    return {row.pop("id"): row for row in table.to_pylist()}


def test_an_image_that_passed_at_once_is_what_it_was(resampled, finished):
    before, after, rows = images(finished), images(resampled), told(resampled)
    assert before.keys() == after.keys() == rows.keys()
    first = {identifier for identifier, row in rows.items() if row["attempt"] == 0}
    assert 0 < len(first) < len(rows)
    assert {identifier for identifier in rows if before[identifier] == after[identifier]} == first


def test_what_passes_is_what_the_classifier_says_of_the_published_images(resampled):
    # Independently of the actor: features of the published files, and softmax by hand.
    ids, features = read_features(resampled.artifact("sample_features"))
    features = features - features.mean(axis=1, keepdims=True)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    W = load_file(resampled.artifact("classifier").local_file("model.safetensors"))["weight"]
    temperature = resampled.artifact("pseudo_labels").manifest["calibration"]["temperature"]
    scores = np.exp(features @ W.T / temperature)
    p = scores / scores.sum(axis=1, keepdims=True)
    rows = told(resampled)
    label = np.array([rows[identifier]["class"] for identifier in ids.to_pylist()])
    passes = (p.argmax(axis=1) == label) & (p.max(axis=1) >= LEAST)
    assert passes.tolist() == [rows[identifier]["passes"] for identifier in ids.to_pylist()]
    assert 0 < passes.sum() < len(passes)


def test_what_was_sampled_is_counted_and_told(resampled):
    rows = told(resampled).values()
    manifest = resampled.artifact("samples").manifest
    sampled = sum(row["attempt"] + 1 if row["passes"] else ATTEMPTS for row in rows)
    assert (manifest["sampled"], manifest["passed"]) == (sampled, sum(row["passes"] for row in rows))
    page = Path(resampled.artifact("report").path("report.html")).read_text(encoding="utf-8")
    assert f"{sampled:,} were sampled for the {len(rows):,} that were taken" in page


def test_more_images_per_class_repeat_and_change_none(resampled, tmp_path):
    run = resampled.copy_to(tmp_path, "generate.images_per_class=40")
    before = shard_files(resampled.artifact("samples"))
    assert run.make("samples") == ["samples"]
    after = shard_files(run.artifact("samples"))
    assert before.items() < after.items()
    assert run.artifact("samples").manifest["sampled"] > resampled.artifact("samples").manifest["sampled"]


def test_an_image_of_a_later_attempt_is_sampled_again_bit_by_bit(resampled, dpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    later = next(row for row in told(resampled).values() if row["attempt"] > 0 and row["passes"])
    which = f"{later['class']}/{later['index']}"
    settings = (*resampled.overrides, f"output={resampled.output}")
    code, out, error = dpt("generate", DIGITS, *settings, "--only", which)
    assert code == 0, error
    assert "(identical to the published one" in out
