"""Shards of generated images: their row groups, and single images read from them at random."""

import io
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.data import shards
from dpt_ray.data.class_ranges import class_ranges, image_columns, items, locate_images
from dpt_ray.data.crops import Crop
from dpt_ray.data.raw_images import RawImages
from dpt_ray.data.shards import encode_png, write_images
from dpt_ray.store.artifact import Artifact

CLASSES, SIZE = 3, 16
UNITS = class_ranges(4, 2, CLASSES)  # two shards of six images


def pixels(label, index):
    """Noise, whose file has nearly the same size for all."""
    return np.random.default_rng([label, index]).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def of_unit(unit):
    return [pixels(*item) for item in items(unit)]


@pytest.fixture
def groups_of_two(monkeypatch):
    """Row groups that have room for two of the images, not for three."""
    monkeypatch.setattr(shards, "ROW_GROUP", int(2.5 * len(encode_png(pixels(0, 0)))))


def test_a_row_group_is_no_larger_than_to_be_read_for_one_image(tmp_path, groups_of_two):
    path, images = tmp_path / "a.parquet", of_unit(UNITS[0])
    write_images(path, images, image_columns("gen", UNITS[0]))
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [2, 2, 2]
    assert file.read()["image"].to_pylist() == [encode_png(image) for image in images]
    write_images(path, images[:0], {"id": pa.array([], pa.string())})
    assert pq.read_table(path).num_rows == 0


def test_small_images_lie_in_one_row_group(tmp_path):
    path, images = tmp_path / "a.parquet", of_unit(UNITS[0])
    columns = image_columns("gen", UNITS[0])
    write_images(path, images, columns)
    table = pa.table({**columns, "image": pa.array([encode_png(image) for image in images])})
    plain = io.BytesIO()
    pq.write_table(table, plain)
    assert path.read_bytes() == plain.getvalue()


def check_at_random(uri):
    samples, published = Artifact(uri), []
    for unit in UNITS:
        write = partial(write_images, images=of_unit(unit), columns=image_columns("gen", unit))
        published.append(samples.publish_shard(unit["shard"], ".parquet", len(items(unit)), write))
    samples.publish({"shards": published})
    rows = locate_images(samples)
    expected = [item for unit in UNITS for item in items(unit)]
    found = zip(rows["class"].to_pylist(), rows["index"].to_pylist(), strict=True)
    assert list(found) == expected
    images = RawImages(rows, Crop("adm", SIZE), "RGB", 0.0)
    order = np.random.default_rng(0).permutation(len(expected))
    assert np.array_equal(images[order], np.stack([pixels(*expected[row]) for row in order]))


def test_generated_images_are_read_at_random(tmp_path, groups_of_two):
    check_at_random(str(tmp_path / "samples"))


def test_generated_images_of_an_object_store_are_read_at_random(s3_bucket, groups_of_two):
    check_at_random(f"{s3_bucket[0]}/samples")
