"""Stages 2 and 3 on made-up features: the feature denoiser, its samples, the classifier, the pilot."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.config import ConfigError
from dpt_ray.config.features import FeatureSampling, FeatureTraining
from dpt_ray.config.sections import Classifier as ClassifierSettings
from dpt_ray.data.rows import PSEUDO_LABELS_FILE, ImageRows, RealRows, Rows, row_normalise
from dpt_ray.data.shards import read_features
from dpt_ray.engine.node import NoSettings
from dpt_ray.learners.linear_classifier import load_classifier
from dpt_ray.stages import feature_samples
from dpt_ray.stages.classifier import Classifier
from dpt_ray.stages.feature_denoiser import FeatureDenoiser, Standard
from dpt_ray.stages.feature_samples import FeatureSamples
from dpt_ray.stages.generated_features import FeatureRetrainSettings, GeneratedFeatures
from dpt_ray.stages.ladder import LadderResults
from dpt_ray.stages.probe import Probe
from dpt_ray.stages.rung import LadderRung, RungSettings
from tests.helpers.feature_store import CLASSES, DIM, feature_store, make

TRAINING = FeatureTraining(
    steps=24, batch_size=16, width=8, depth=1, warmup_steps=0, checkpoint_every=8, learning_rate=5e-3
)
LABELLED = ("index", "features", "labels")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Units run one after the other in this process."""

    def run_actors(units, actor, arguments, compute, progress, images):
        do = actor(**arguments(1))
        for unit in units:
            do(unit)
        return {"startup_seconds": 0.0, "peak_memory_bytes": 0}

    monkeypatch.setattr(feature_samples, "run_actors", run_actors)


@pytest.fixture
def stored(tmp_path):
    """A store with features, and a rung's pseudo-labels of them."""
    store, made = feature_store(tmp_path)
    settings = RungSettings(method="balanced_self_training", probe_l2=0.0025)
    inputs = {key: made[key] for key in LABELLED}
    made["balanced_self_training"] = make(LadderRung, store, inputs, settings, "balanced_self_training")
    return store, made


def inputs_of_denoiser(made):
    return {
        "index": made["index"],
        "features": made["features"],
        "pseudo_labels": made["balanced_self_training"],
    }


def train(store, made, name="it", **settings):
    changed = TRAINING.model_copy(update=settings)
    return make(FeatureDenoiser, store, inputs_of_denoiser(made), changed, name, train_workers=0)


def draw(store, denoiser, count, name="it", batch_size=256, **settings):
    chosen = FeatureSampling(nfe=4, **settings)
    inputs = {"feature_denoiser": denoiser}
    return make(FeatureSamples, store, inputs, chosen, name, count, batch_size=batch_size)


def by_id(samples):
    ids, features = read_features(samples)
    return dict(zip(ids.to_pylist(), features, strict=True))


def test_features_are_standardised_over_the_training_images():
    rng = np.random.default_rng(0)
    matrix = rng.normal(3, [0.1, 2, 0], (9000, 3)).astype(np.float32)  # the last one is 3 everywhere
    rows = Rows(matrix, np.zeros(8500, np.int64), np.arange(500, 9000))
    standard = Standard.of(rows)
    np.testing.assert_allclose(standard.mean, matrix[500:].mean(axis=0, dtype=float), rtol=1e-5)
    np.testing.assert_allclose(standard.std[:2], matrix[500:, :2].std(axis=0, dtype=float), rtol=1e-4)
    found = standard(matrix[500:])
    np.testing.assert_allclose(found.std(axis=0), [1, 1, 0], atol=1e-3)


def test_the_denoiser_has_the_statistics_of_the_normalised_training_rows(stored):
    from dpt_ray.models.feature_denoiser import load_feature_denoiser

    denoiser = load_feature_denoiser(train(*stored).uri)
    ids, raw = read_features(stored[1]["features"])
    train_rows = np.array([name.startswith("train") for name in ids.to_pylist()])
    rows = row_normalise(raw)[train_rows]
    np.testing.assert_allclose(denoiser.mean, rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(denoiser.std, rows.std(axis=0), rtol=1e-4)
    assert denoiser.told["model"] == {"dim": DIM, "width": 8, "depth": 1, "num_classes": 3}


def test_a_killed_training_continues_to_the_same_bits(stored, monkeypatch):
    store, made = stored
    whole = train(store, made, "whole")
    calls, standardise = [], Standard.__call__

    def killed_at_20(self, features):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return standardise(self, features)

    with monkeypatch.context() as patched:
        patched.setattr(Standard, "__call__", killed_at_20)
        with pytest.raises(KeyboardInterrupt):
            train(store, made, "killed")
    continued = []
    monkeypatch.setattr(Standard, "__call__", lambda self, x: (continued.append(1), standardise(self, x))[1])
    again = train(store, made, "killed")
    assert len(continued) == 24 - 16  # from the checkpoint of step 16
    assert again.read_bytes("model.safetensors") == whole.read_bytes("model.safetensors")


def test_a_feature_is_the_same_whatever_is_drawn_beside_it(stored):
    store, made = stored
    denoiser = train(store, made)
    few = draw(store, denoiser, 2, "few", batch_size=5)
    many = draw(store, denoiser, 70, "many")
    assert [len(samples.listed_shards()) for samples in (few, many)] == [1, 2]
    found, more = by_id(few), by_id(many)
    assert found.keys() < more.keys() and "feat-00002-0000001" in found
    for name, feature in found.items():
        np.testing.assert_allclose(feature, more[name], atol=1e-5)
    assert len({tuple(feature) for feature in more.values()}) == len(more)  # none twice
    other = by_id(draw(store, denoiser, 2, "other", seed=1))
    assert not np.allclose(other["feat-00000-0000000"], found["feat-00000-0000000"], atol=1e-3)


def test_more_features_add_shards_and_make_none_again(stored):
    store, made = stored
    denoiser = train(store, made)
    first = draw(store, denoiser, 64).shards()
    grown = draw(store, denoiser, 65)
    assert grown.manifest["made"] == 1 and len(grown.listed_shards()) == 2
    assert all(grown.shards()[key] == shard for key, shard in first.items())


def test_samples_are_read_as_features_and_as_what_they_are_of(stored):
    store, made = stored
    samples = draw(store, train(store, made), 5)
    rows = ImageRows(samples, samples).first(5)
    assert rows.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    found = by_id(samples)
    np.testing.assert_allclose(rows.features[6], row_normalise(found["feat-00001-0000001"][None])[0])


def test_a_class_without_a_pseudo_label_is_named(stored):
    store, made = stored
    file = made["balanced_self_training"].local_file(PSEUDO_LABELS_FILE)
    table = pq.read_table(file)
    zeros = pa.array(np.where(table["label"].to_numpy() == 1, 0, table["label"].to_numpy()), pa.int32())
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", zeros), file)
    with pytest.raises(ConfigError, match=r"feature_diffusion: .* pseudo-label elm \(1 such classes\)"):
        train(store, made)


def retrain(store, made, samples, count=20):
    inputs = {**{key: made[key] for key in LABELLED}, "feature_samples": samples}
    settings = FeatureRetrainSettings(images_per_class=count, real_weight=1.0)
    return make(GeneratedFeatures, store, inputs, settings, "generated_features")


def test_the_classifier_chooses_its_penalty_on_validation(stored):
    store, made = stored
    classifier = retrain(store, made, draw(store, train(store, made, steps=200), 20))
    manifest = classifier.manifest
    assert (manifest["rows"], manifest["labelled"]) == (3 * 20 + 6, 6)
    facts = manifest["rung"]
    assert (facts["method"], facts["chosen_on"], facts["n"]) == ("generated_features", "validation", 30)
    validation = RealRows(made["index"], made["features"], ("validation",)).validation
    right = ((validation.features @ load_classifier(classifier).T).argmax(axis=1) == validation.labels).mean()
    assert facts["top1"] == pytest.approx(right) and right > 0.6
    assert manifest["calibration"]["n"] == 30


def test_without_validation_images_the_default_is_taken_and_said(tmp_path, caplog):
    store, made = feature_store(tmp_path, validation=False)
    settings = RungSettings(method="self_training", probe_l2=0.0025)
    inputs = {key: made[key] for key in LABELLED}
    made["balanced_self_training"] = make(LadderRung, store, inputs, settings, "rung")
    manifest = retrain(store, made, draw(store, train(store, made), 20)).manifest
    assert (manifest["rung"]["chosen_on"], manifest["rung"]["setting"]) == ("none", 0.001)
    assert manifest["calibration"] == {"temperature": 1.0, "n": 0} and "no validation images" in caplog.text


def test_the_pilot_has_the_gain_over_balanced_self_training_and_the_seconds_of_all(stored):
    store, made = stored
    denoiser = train(store, made)
    samples = draw(store, denoiser, 20)
    classifier = make(Classifier, store, {key: made[key] for key in LABELLED}, ClassifierSettings(), "first")
    labels = made["balanced_self_training"]
    probe = {key: made[key] for key in ("index", "features", "labels")} | {"classifier": classifier}
    inputs = {
        **{key: made[key] for key in ("index", "features", "labels", "balanced_self_training")},
        "classifier": classifier,
        "pseudo_labels": labels,
        "probe": make(Probe, store, {**probe, "pseudo_labels": labels}, NoSettings(), "first"),
        "feature_denoiser": denoiser,
        "feature_samples": samples,
        "generated_features": retrain(store, made, samples),
    }
    result = make(LadderResults, store, inputs, NoSettings()).manifest["result"]
    row = result["ladder"][-1]
    test = RealRows(made["index"], made["features"], ("test",)).of_split("test")
    hits = [
        ((test.features @ load_classifier(inputs[name]).T).argmax(axis=1) == test.labels) * 1.0
        for name in ("generated_features", "balanced_self_training")
    ]
    difference = hits[0] - hits[1]
    assert row["method"] == "generated_features" and row["seconds"] == 3.0  # each artifact here says 1 s
    assert row["over_balanced"]["gain"] == pytest.approx(difference.mean())
    assert row["over_balanced"]["stderr"] == pytest.approx(difference.std(ddof=1) / np.sqrt(60))
    assert len(CLASSES) == 3 and result["accuracy"][-1]["note"].startswith("lambda x classes")
