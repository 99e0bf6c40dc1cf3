"""The stages of the ladder on made-up features: graph, rungs, the best of them, their measurement."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors

from dpt_ray.config import ConfigError
from dpt_ray.config.ladder import RUNGS
from dpt_ray.config.sections import Classifier as ClassifierSettings
from dpt_ray.data.graph import read_graph
from dpt_ray.data.rows import LABELS_FILE, PSEUDO_LABELS_FILE, RealRows, row_normalise
from dpt_ray.data.shards import read_features
from dpt_ray.data.units import INDEX, read_index
from dpt_ray.engine.node import NoSettings
from dpt_ray.learners.label_quality import quality, quality_by_class, read_given
from dpt_ray.learners.ladder import Images, Rung, climb
from dpt_ray.learners.linear_classifier import load_classifier
from dpt_ray.stages import graph as graph_stage
from dpt_ray.stages import pseudo_labels
from dpt_ray.stages.best_rung import BestRung, BestRungSettings
from dpt_ray.stages.classifier import Classifier
from dpt_ray.stages.graph import Graph, GraphSettings
from dpt_ray.stages.ladder import LadderResults
from dpt_ray.stages.probe import Probe
from dpt_ray.stages.pseudo_labels import PseudoLabels
from dpt_ray.stages.rung import LadderRung, RungSettings
from tests.helpers.feature_store import CLASSES, feature_store, make


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    """Units run one after the other in this process."""

    def run_tasks(units, work, compute, progress, images, name="", held=0):
        do = work(1)
        for unit in units:
            do(unit)
        return {"startup_seconds": 0.0, "peak_memory_bytes": 0}

    for module in (graph_stage, pseudo_labels):
        monkeypatch.setattr(module, "run_tasks", run_tasks)


def make_graph(store, made, k=8):
    return make(Graph, store, {key: made[key] for key in ("index", "features")}, GraphSettings(neighbours=k))


def make_rung(store, made, method="balanced_self_training", **settings):
    chosen = RungSettings(method=method, probe_l2=0.0025, **settings)
    inputs = {key: made[key] for key in ("index", "features", "labels")}
    if method == "propagation":
        inputs["graph"] = made["graph"]
    return make(LadderRung, store, inputs, chosen, method)


def stage_1(store, made):
    """The paper's classifier, its pseudo-labels and the probe."""
    inputs = {key: made[key] for key in ("index", "features", "labels")}
    classifier = make(Classifier, store, inputs, ClassifierSettings(), "first")
    scored = {"index": made["index"], "features": made["features"], "classifier": classifier}
    labels = make(PseudoLabels, store, scored, NoSettings(), "first")
    judged = {**scored, "labels": made["labels"], "pseudo_labels": labels}
    probe = make(Probe, store, judged, NoSettings(), "first")
    return {"classifier": classifier, "pseudo_labels": labels, "probe": probe}


@pytest.mark.parametrize("rows", [7, 4096])
def test_the_graph_has_the_training_images_alone_whatever_the_shards(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(graph_stage, "ROWS", rows)
    store, made = feature_store(tmp_path)
    found = make_graph(store, made, 5)
    ids, neighbours, cosines = read_graph(found)
    assert len(found.manifest["shards"]) == -(-120 // rows) and found.manifest["rows"] == 120
    assert all(name.startswith("train-") for name in ids.to_pylist())
    ids_of, raw = read_features(made["features"])
    train = raw[pc.starts_with(ids_of, "train").to_numpy(zero_copy_only=False)].astype(np.float64)
    fitted = NearestNeighbors(n_neighbors=6, metric="cosine").fit(train - train.mean(axis=0))
    distances, wanted = fitted.kneighbors()
    np.testing.assert_array_equal(neighbours, wanted[:, :5])
    np.testing.assert_allclose(cosines, 1 - distances[:, :5], atol=1e-5)


def test_a_graph_is_continued_from_its_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_stage, "ROWS", 50)
    store, made = feature_store(tmp_path)
    before = make_graph(store, made)
    files = {key: shard["file"] for key, shard in before.shards().items()}
    lost = before.shards()["rows-000000050"]
    for name in (lost["file"], "shards/rows-000000050.json", "manifest.json"):
        before.fs.rm_file(before.path(name))
    after = {key: shard["file"] for key, shard in make_graph(store, made).shards().items()}
    assert {key for key in files if files[key] != after[key]} == {"rows-000000050"}


def test_more_neighbours_than_images_are_refused(tmp_path):
    store, made = feature_store(tmp_path)
    with pytest.raises(ConfigError, match=r"ladder.neighbours: 120 .* 120 training images .* at most 119"):
        make_graph(store, made, 120)


@pytest.mark.parametrize("method", RUNGS)
def test_a_rung_has_a_classifier_and_its_calibrated_pseudo_labels_for_every_image(tmp_path, method):
    store, made = feature_store(tmp_path)
    made["graph"] = make_graph(store, made)
    rung = make_rung(store, made, method)
    table = pq.read_table(rung.local_file(PSEUDO_LABELS_FILE))
    reference = stage_1(store, made)["pseudo_labels"]
    assert table.schema == pq.read_table(reference.local_file(PSEUDO_LABELS_FILE)).schema
    ids, raw = read_features(made["features"])
    assert table["id"].combine_chunks().equals(ids)
    decisions = row_normalise(raw) @ load_classifier(rung).T / rung.manifest["calibration"]["temperature"]
    np.testing.assert_array_equal(table["label"], decisions.argmax(axis=1))
    np.testing.assert_allclose(table["confidence"], softmax(decisions, axis=1).max(axis=1), rtol=1e-4)
    validation = RealRows(made["index"], made["features"], ("validation",)).validation
    right = ((validation.features @ load_classifier(rung).T).argmax(axis=1) == validation.labels).mean()
    facts = rung.manifest["rung"]
    assert facts["top1"] == rung.manifest["validation_top1"] == pytest.approx(right) and right > 0.7
    assert (facts["chosen_on"], facts["n"]) == ("validation", 30)


@pytest.mark.parametrize(("labels", "on", "n"), [(3, "cross-validation", 9), (1, "none", 0)])
def test_without_validation_images_the_choice_is_said(tmp_path, caplog, labels, on, n):
    store, made = feature_store(tmp_path, labels, validation=False)
    manifest = make_rung(store, made).manifest
    assert (manifest["rung"]["chosen_on"], manifest["rung"]["n"]) == (on, n)
    assert manifest["calibration"]["n"] == n and manifest["n_validation"] == 0
    assert ("nothing can be chosen" in caplog.text) == (on == "none")
    assert (manifest["calibration"]["temperature"] == 1.0) == (on == "none")


def test_a_choice_on_the_labels_is_that_of_a_set_without_validation_images(tmp_path):
    store, made = feature_store(tmp_path / "with", 3)
    chosen = make_rung(store, made, choose_on="labels")
    facts = chosen.manifest
    assert (facts["rung"]["chosen_on"], facts["rung"]["n"], facts["calibration"]["n"]) == (
        "cross-validation",
        9,
        9,
    )
    assert facts["n_validation"] == 30 and facts["validation_top1"] > 0.7  # measured, not chosen on
    images = RealRows(made["index"], made["features"], ("train",), made["labels"])
    few = images.labelled(made["labels"])
    train = np.arange(len(images.ids))
    alone = Images(images.features, train, few.index, few.labels, len(CLASSES))
    nothing = images.validation
    assert len(nothing) == 0
    found = climb(Rung("balanced_self_training", 0.0025), alone, nothing, lambda done, total: None)
    np.testing.assert_allclose(load_classifier(chosen), found.weights, rtol=1e-4, atol=1e-5)
    # Ordinarily the same rung is chosen on the validation images.
    assert make_rung(store, made).manifest["rung"]["chosen_on"] == "validation"


def test_the_best_by_the_labels_leaves_out_the_probe_which_chooses_nothing(tmp_path):
    store, made = feature_store(tmp_path, 3)
    first = stage_1(store, made)
    inputs = {key: first[key] for key in ("classifier", "pseudo_labels")}
    rungs = {name: make_rung(store, made, name, choose_on="labels") for name in RUNGS[1:3]}
    best = make(BestRung, store, {**inputs, **rungs}, BestRungSettings(choose_on="labels"), "best")
    scores = {name: rung.manifest["rung"]["top1"] for name, rung in rungs.items()}
    assert scores[best.manifest["best"]] == max(scores.values())


def test_a_prior_of_another_length_is_refused(tmp_path):
    store, made = feature_store(tmp_path)
    with pytest.raises(ConfigError, match=r"ladder.prior: 2 shares, and there are 3 classes"):
        make_rung(store, made, prior=(0.5, 0.5))


def test_a_class_without_a_label_is_named(tmp_path):
    store, made = feature_store(tmp_path)
    table = pq.read_table(made["labels"].local_file(LABELS_FILE))
    kept = table.filter(pc.not_equal(table["label"], pa.scalar(1, pa.int32())))
    pq.write_table(kept, made["labels"].local_file(LABELS_FILE))
    made["graph"] = make_graph(store, made)
    with pytest.raises(ConfigError, match=r"labels: no label of class elm \(1 such classes\)"):
        make_rung(store, made, "propagation")


def test_a_graph_of_other_features_is_refused(tmp_path):
    store, made = feature_store(tmp_path)
    made["graph"] = make_graph(store, made)
    manifest = made["graph"].manifest
    made["graph"].publish(manifest | {"inputs": {"features": "features/another"}})
    with pytest.raises(ConfigError, match=r"is of features/another, and the features here are features/0"):
        make_rung(store, made, "propagation")


def test_a_known_prior_moves_the_labels_towards_it(tmp_path):
    store, made = feature_store(tmp_path)
    made["graph"] = make_graph(store, made)

    def share(prior):
        rung = make_rung(store, made, "propagation", prior=prior)
        labels = pq.read_table(rung.local_file(PSEUDO_LABELS_FILE))["label"].to_numpy()
        return np.bincount(labels, minlength=3)[0] / len(labels)

    assert share((0.6, 0.25, 0.15)) > share("uniform")


def test_the_best_rung_has_the_files_of_the_best_on_validation(tmp_path):
    store, made = feature_store(tmp_path)
    first = stage_1(store, made)
    rungs = {name: make_rung(store, made, name) for name in RUNGS[:3]}
    scores = {"probe": first["classifier"].manifest["validation_top1"]}
    scores |= {name: rung.manifest["validation_top1"] for name, rung in rungs.items()}
    inputs = {key: first[key] for key in ("classifier", "pseudo_labels")}
    best = make(BestRung, store, {**inputs, **rungs}, BestRungSettings(), "best")
    chosen = best.manifest["best"]
    assert scores[chosen] == max(scores.values())
    source = rungs.get(chosen, first["pseudo_labels"])
    names = (PSEUDO_LABELS_FILE,)
    assert [best.read_bytes(name) for name in names] == [source.read_bytes(name) for name in names]
    assert best.manifest["calibration"] == source.manifest["calibration"]


@pytest.mark.parametrize(("of_probe", "best"), [(0.4, RUNGS[0]), (0.5, "probe")])
def test_a_tie_goes_to_the_cheaper_rung(tmp_path, of_probe, best):
    store, made = feature_store(tmp_path)
    first = stage_1(store, made)
    rungs = {name: make_rung(store, made, name) for name in RUNGS[:3]}
    for rung in rungs.values():
        rung.publish(rung.manifest | {"rung": rung.manifest["rung"] | {"top1": 0.5}})
    first["classifier"].publish(first["classifier"].manifest | {"validation_top1": of_probe})
    inputs = {key: first[key] for key in ("classifier", "pseudo_labels")}
    chosen = make(BestRung, store, {**inputs, **dict(reversed(rungs.items()))}, BestRungSettings(), "best")
    assert chosen.manifest["best"] == best


def test_where_nothing_can_be_chosen_the_best_is_the_probe_or_the_free_control_and_says_so(tmp_path, caplog):
    store, made = feature_store(tmp_path, 1, validation=False)
    first = stage_1(store, made)
    inputs = {key: first[key] for key in ("classifier", "pseudo_labels")}
    best = make(
        BestRung,
        store,
        {**inputs, "self_training": make_rung(store, made, "self_training")},
        BestRungSettings(),
        "b",
    )
    assert best.manifest["best"] == "probe" and "pseudo-labels of probe are taken" in caplog.text
    np.testing.assert_array_equal(load_classifier(best), load_classifier(first["classifier"]))
    balanced = make_rung(store, made, "balanced_self_training")
    best = make(BestRung, store, {**inputs, "balanced_self_training": balanced}, BestRungSettings(), "c")
    assert best.manifest["best"] == "balanced_self_training" and "of balanced_self_training" in caplog.text
    np.testing.assert_array_equal(load_classifier(best), load_classifier(balanced))


def test_the_ladder_has_paired_gains_on_test_and_seconds(tmp_path):
    store, made = feature_store(tmp_path)
    made["graph"] = make_graph(store, made)
    first = stage_1(store, made)
    rungs = {name: make_rung(store, made, name) for name in ("balanced_self_training", "propagation")}
    inputs = {key: made[key] for key in ("index", "features", "labels", "graph")} | first | rungs
    result = make(LadderResults, store, inputs, NoSettings()).manifest["result"]
    assert [row["method"] for row in result["accuracy"]] == ["probe", "balanced_self_training", "propagation"]
    test = RealRows(made["index"], made["features"], ("test",)).of_split("test")
    sources = {"probe": first["classifier"], **rungs}
    hits = {name: right(test, source) for name, source in sources.items()}
    rows = {row["method"]: row for row in result["ladder"]}
    for name, row in rows.items():
        assert row["test"] == pytest.approx(hits[name].mean())
    difference = hits["propagation"] - hits["balanced_self_training"]
    assert rows["propagation"]["over_balanced"] == pytest.approx(
        {"gain": difference.mean(), "stderr": difference.std(ddof=1) / np.sqrt(60)}
    )
    assert rows["probe"]["over_probe"] is None and rows["balanced_self_training"]["over_balanced"] is None
    judged = rows["propagation"]["over_balanced_validation"]
    validation = RealRows(made["index"], made["features"], ("validation",)).validation
    mine, control = (right(validation, rungs[name]) for name in ("propagation", "balanced_self_training"))
    assert judged["n"] == len(validation) and judged["gain"] == pytest.approx((mine - control).mean())
    # Each artifact of these tests says 1 s: of the probe also the pseudo-labels', of propagation the graph's.
    assert [row["seconds"] for row in rows.values()] == [2.0, 1.0, 2.0]
    for name, row in rows.items():
        check_labels(row["labels"], made, first["pseudo_labels"] if name == "probe" else rungs[name])


def right(rows, source):
    """Return 1 for each row whose label has the largest logit of `source`'s classifier, else 0."""
    return ((rows.features @ load_classifier(source).T).argmax(axis=1) == rows.labels) * 1.0


def check_labels(found, made, source):
    """Compare the quality of pseudo-labels with that of a plain loop over the table."""
    truth = dict(zip(*(read_index(made["index"])[key].to_pylist() for key in ("id", "label")), strict=True))
    fitted = set(pq.read_table(made["labels"].local_file(LABELS_FILE))["id"].to_pylist())
    assert len(fitted) == 6
    table = pq.read_table(source.local_file(PSEUDO_LABELS_FILE)).to_pylist()
    train = [row for row in table if row["split"] == "train"]
    shares = [sum(row["label"] == c for row in train) / 120 for c in range(len(CLASSES))]
    bins = [[] for _ in range(15)]
    for row in (row for row in train if row["id"] not in fitted):
        right = row["label"] == truth[row["id"]]
        bins[math.ceil(row["confidence"] * 15) - 1].append((row["confidence"], right))
    sums = [[sum(column) for column in zip(*rows, strict=True)] for rows in bins if rows]
    wanted = {
        "accuracy": sum(right for _, right in sums) / 114,
        "ece": sum(abs(confidence - right) for confidence, right in sums) / 114,
        "n": 114,
        "smallest": min(shares),
        "largest": max(shares),
    }
    assert found == pytest.approx(wanted, abs=1e-6) and found["accuracy"] > 0.7


def test_labels_of_images_without_a_known_class_are_counted_but_not_judged(tmp_path):
    store, made = feature_store(tmp_path)
    labels, index = stage_1(store, made)["pseudo_labels"], made["index"]
    table = read_index(index)
    hidden = pc.if_else(pc.equal(table["split"], "train"), pa.scalar(None, pa.int32()), table["label"])
    pq.write_table(table.set_column(2, "label", hidden), index.local_file(INDEX))
    given = read_given(index, made["labels"], labels)
    found = quality(given)
    assert (found["accuracy"], found["ece"], found["n"]) == (None, None, 0) and found["largest"] > 1 / 3
    assert quality_by_class(given) is None


def test_images_that_the_classifier_was_fitted_on_do_not_judge_its_pseudo_labels(tmp_path):
    store, made = feature_store(tmp_path)
    labels, index = stage_1(store, made)["pseudo_labels"], made["index"]
    table, few = read_index(index), pq.read_table(made["labels"].local_file(LABELS_FILE))
    others = pc.invert(pc.is_in(table["id"], value_set=few["id"].combine_chunks()))
    hidden = pc.if_else(others, pa.scalar(None, pa.int32()), table["label"])
    pq.write_table(table.set_column(2, "label", hidden), index.local_file(INDEX))
    assert quality(read_given(index, made["labels"], labels))["n"] == 0
