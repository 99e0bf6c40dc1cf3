"""The report's pictures: of every class, from no more files than they need."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dpt_ray.data import units
from dpt_ray.data.index import build_index
from dpt_ray.data.shards import write_images
from dpt_ray.report.picture_rows import picture_rows, real_rows
from dpt_ray.store.artifact import Store

CLASSES, IMAGES, SIDE = 3, 40, 4


def pixels(label, number):
    """An image that tells which one it is."""
    return np.full((SIDE, SIDE, 3), (label, number, 200), np.uint8)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index class by class, as a folder's is, with a unit for each image."""
    monkeypatch.setattr(units, "ROWS", 1)
    rows = []
    for label in range(CLASSES):
        for number in range(IMAGES):
            path = tmp_path / f"{label}-{number}.png"
            Image.fromarray(pixels(label, number)).save(path)
            rows.append((path.stem, f"file://{path}", 0, -1, "test", f"class{label}"))
    table, classes = build_index(rows)
    artifact = Store(str(tmp_path / "output")).artifact("index", "0")
    listed = units.write_index(artifact, table)
    artifact.write_json("classes.json", classes)
    artifact.publish({"mode": "RGB", "units": listed})
    return artifact


@pytest.fixture
def samples(tmp_path):
    """Generated images in three shards of two indices x all classes; number 100 + index of its class."""
    artifact = Store(str(tmp_path / "output")).artifact("samples", "0")
    shards = []
    for first in (0, 2, 4):
        items = [(label, i) for i in (first, first + 1) for label in range(CLASSES)]
        columns = {"class": pa.array([label for label, _ in items], pa.int32())}
        images = [pixels(label, 100 + i) for label, i in items]

        def write(path, images=images, columns=columns):
            write_images(path, images, columns)

        shards.append(artifact.publish_shard(f"i{first}", ".parquet", len(items), write))
    artifact.publish({"shards": shards})
    return artifact


def numbers(rows):
    """(class, its numbers) of the real and of the generated images."""
    return [
        [
            [(int(image[0, 0, 0]), int(image[0, 0, 1])) for image in images]
            for images in (row.real, row.generated)
        ]
        for row in rows
    ]


def test_every_class_has_its_first_test_images_however_many_come_before(index, samples):
    rows = picture_rows(index, samples, 2)
    assert [row.class_name for row in rows] == ["class0", "class1", "class2"]
    assert numbers(rows) == [[[(k, 0), (k, 1)], [(k, 100), (k, 101)]] for k in range(CLASSES)]


def test_no_image_that_is_not_shown_is_read(index, samples, tmp_path):
    for path in tmp_path.glob("*.png"):
        if int(path.stem.split("-")[1]) >= 3:
            path.unlink()
    Path(samples.local_file(samples.listed_shards()[2]["file"])).unlink()
    shown = numbers(picture_rows(index, samples, 3))
    assert shown == [[[(k, n) for n in range(3)], [(k, 100 + n) for n in range(3)]] for k in range(CLASSES)]


def test_fewer_are_shown_where_there_are_no_more_or_one_cannot_be_read(index, samples, tmp_path):
    (tmp_path / "1-0.png").write_bytes(b"")
    rows = numbers(picture_rows(index, samples, 8))
    assert [len(generated) for _, generated in rows] == [6] * CLASSES
    assert [real[0] for real, _ in rows] == [(0, 0), (1, 1), (2, 0)]
    assert [len(real) for real, _ in rows] == [8, 7, 8]


def test_a_run_without_test_images_shows_the_generated_ones(index, samples):
    table = units.read_index(index)
    train = table.set_column(table.schema.get_field_index("split"), "split", pa.array(["train"] * len(table)))
    units.write_index(index, train)
    assert numbers(picture_rows(index, samples, 1)) == [[[], [(k, 100)]] for k in range(CLASSES)]


def test_without_samples_every_class_has_its_first_test_images(index):
    rows = real_rows(index, SIDE, 3)
    assert [row.class_name for row in rows] == ["class0", "class1", "class2"]
    assert numbers(rows) == [[[(k, 0), (k, 1), (k, 2)], []] for k in range(CLASSES)]
