"""Measures of some of the generated images: of all classes alike, however shards lie, and what they say."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch

from dpt_ray.config import load_config
from dpt_ray.data import class_ranges
from dpt_ray.data.crops import Crop
from dpt_ray.data.shards import write_features, write_images
from dpt_ray.evaluation import distances
from dpt_ray.evaluation.inception import Activations
from dpt_ray.evaluation.merged import read_statistics
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages import inception_statistics as inception
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.toy import task_of

CLASSES, INDICES = 5, 4


@pytest.fixture(autouse=True)
def few_classes_a_shard(monkeypatch):
    for module in (class_ranges, inception):
        monkeypatch.setattr(module, "CLASSES_PER_SHARD", 2)


@pytest.fixture
def index(tmp_path):
    artifact = Store(str(tmp_path)).artifact("index", "0")
    units = [{"shard": split, "split": split} for split in ("train", "test")]
    artifact.publish({"classes": CLASSES, "mode": "RGB", "units": units})
    return artifact


def publish(artifact, write):
    """Shards of two indices by two classes; `write(path, unit)` writes one."""
    shards = []
    for unit in class_ranges.class_ranges(INDICES, 2, CLASSES):
        rows = len(class_ranges.items(unit))
        shards.append(
            artifact.publish_shard(unit["shard"], ".parquet", rows, lambda path, unit=unit: write(path, unit))
        )
    artifact.publish({"shards": shards, "mode": "RGB"})
    return artifact


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5])
def test_the_first_images_are_those_of_the_lowest_index_and_class_and_come_first_in_their_shard(classes):
    units = class_ranges.class_ranges(INDICES, 2, classes)
    in_order = sorted((index, label) for unit in units for label, index in class_ranges.items(unit))
    for count in range(len(in_order) + 3):
        chosen = []
        for unit in units:
            table = pa.table(class_ranges.image_columns("gen", unit))
            first = class_ranges.first_of_all(table, classes, count)
            assert first[: first.sum()].all()
            chosen += [(index, label) for label, index in class_ranges.items(unit)[: first.sum()]]
        assert sorted(chosen) == in_order[:count]


def measure(tmp_path, monkeypatch, index, *overrides):
    """The statistics of the generated images by an Inception that sees the (index, class) in their pixels."""

    def read_off(network, batch, resize):
        what = batch[:, 0, 0, :2].float()
        return Activations(what, what, torch.full((len(what), 4), 0.25))

    def measure_here(parts, actor, arguments, compute, progress, images):
        measure_part = actor(arguments(1)["sets"], "", 3, 1)
        assert sum(measure_part(part)["images"] for part in parts) == images  # what progress tells
        return {}

    monkeypatch.setattr("dpt_ray.evaluation.inception.load_inception", lambda weights, device: None)
    monkeypatch.setattr("dpt_ray.evaluation.inception.activations", read_off)
    monkeypatch.setattr(inception, "run_actors", measure_here)
    monkeypatch.setattr(inception, "PART", 4)
    monkeypatch.setattr(inception, "KEPT_FEATURES", 8)

    samples = publish_samples(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"any")
    given = f"evaluate.inception={tmp_path / 'weights.pth'}"
    config = load_config(DIGITS, [given, *overrides])
    node = flow(config)["inception_samples"]
    out = node.artifact(Store(str(tmp_path)))
    store = Store(str(tmp_path))
    inputs = {"inception": store.artifact("inception", "0"), "images": samples, "index": index}
    out.publish(inception.InceptionStatistics.make(task_of(node, store, config.compute, inputs)))
    return read_statistics(out)


def publish_samples(tmp_path):
    """Images whose first two colours are (index, class)."""

    def write(path, unit):
        images = [
            np.full((8, 8, 3), (index, label, 0), np.uint8) for label, index in class_ranges.items(unit)
        ]
        write_images(path, images, class_ranges.image_columns("gen", unit))

    samples = Store(str(tmp_path)).artifact("samples", "0")
    return samples if samples.published else publish(samples, write)


def in_order(count):
    """The first (index, class), every class once before any twice."""
    return [[n // CLASSES, n % CLASSES] for n in range(count)]


def test_kept_features_are_of_all_classes_alike(tmp_path, monkeypatch, index):
    found = measure(tmp_path, monkeypatch, index)
    assert found.count == CLASSES * INDICES
    assert found.first(8).tolist() == in_order(8)
    assert found.first(6).tolist() == in_order(6)
    assert found.first(99).tolist() == in_order(8)


@pytest.mark.parametrize("count", [1, 6, 9, 13])
def test_so_many_measured_images_are_of_all_classes_alike(tmp_path, monkeypatch, index, count):
    found = measure(tmp_path, monkeypatch, index, f"evaluate.images={count}")
    assert found.count == count
    expected = np.array(in_order(count), float)
    np.testing.assert_allclose(found.pool.mean, expected.mean(0))
    np.testing.assert_allclose(found.pool.comoment, (expected - expected.mean(0)).T @ expected, atol=1e-9)
    # Class + index modulo 10.
    assert found.score.counts.tolist() == np.bincount(expected.sum(1).astype(int), minlength=10).tolist()


def test_other_numbers_of_images_share_no_part_of_other_images(tmp_path, monkeypatch, index):
    for count in (5, 8):  # the first 4 in shard order are others
        found = measure(tmp_path, monkeypatch, index, f"evaluate.images={count}")
        np.testing.assert_allclose(found.pool.mean, np.mean(in_order(count), 0))


@pytest.fixture
def features(tmp_path, index):
    """What a run's evaluation is handed: features of an encoder, given by (index, class) or split as well."""
    store, random = Store(str(tmp_path)), np.random.default_rng(0)
    made = {
        (i, k): random.normal(k, 1 + i, 3).astype(np.float32) for i in range(INDICES) for k in range(CLASSES)
    }

    def write(path, unit):
        rows = [made[index, label] for label, index in class_ranges.items(unit)]
        write_features(path, class_ranges.image_columns("gen", unit)["id"], np.stack(rows))

    generated, real = publish(store.artifact("sample_features", "0"), write), store.artifact("features", "0")
    shards = []
    for split, count in (("train", 7), ("test", 9)):
        made[split] = random.normal(0, 2, (count, 3)).astype(np.float32)

        def write_split(path, values=made[split]):
            write_features(path, [str(row) for row in range(len(values))], values)

        shards.append(real.publish_shard(split, ".parquet", count, write_split))
    real.publish({"shards": shards})
    return {"index": index, "features": real, "sample_features": generated}, made


def rows_by(tmp_path, inputs, identity, crop):
    """The Frechet rows of a run with an encoder of some identity and crop."""
    encoder = Store(str(tmp_path)).artifact("encoder", identity)
    encoder.publish({"identity": identity, "crop": asdict(crop)})
    what = "the run's own encoder, DPT's classifier is trained in these features"
    extractor = distances.Extractor(encoder, inputs["features"], inputs["sample_features"], what)
    return distances.frechet_rows(inputs["index"], publish_samples(tmp_path), extractor)


def test_frechet_rows_compare_images_of_all_classes_alike(tmp_path, features):
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    def statistics(x):
        return {"mu": x.mean(0, dtype=np.float64), "sigma": np.cov(x.astype(np.float64), rowvar=False)}

    inputs, made = features
    found, floor = rows_by(tmp_path, inputs, "0123456789abcdef", Crop("none", 8))
    first = np.stack([made[index, label] for index, label in in_order(7)])
    for row, some in ((found, first), (floor, made["train"])):
        expected = fid_statistics_to_metric(statistics(some), statistics(made["test"]), False)
        assert row["value"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
        assert (row["n_generated"], row["n_reference"]) == (7, 9)


def test_frechet_rows_say_which_encoder_saw_what_crop(tmp_path, features):
    one = rows_by(tmp_path, features[0], "0123456789abcdef", Crop("eval", 224, 256))
    other = rows_by(tmp_path, features[0], "fedcba9876543210", Crop("adm", 32))
    told = [[(row["extractor"].split(",")[0], row["resize"]) for row in rows] for rows in (one, other)]
    assert told == [
        [("the run's own encoder (01234567)", "bilinear 256, crop 224")] * 2,
        [("the run's own encoder (fedcba98)", "ADM's centre crop 32")] * 2,
    ]
