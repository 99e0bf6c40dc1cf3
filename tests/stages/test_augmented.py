"""The augmented views: which images are read for them, and what they are."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dpt_ray.config import ConfigError, load_config
from dpt_ray.learners.digits import digit_view as random_views
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages import augmented as augment
from dpt_ray.store.artifact import Store
from dpt_ray.training.random import StepRandom
from tests.helpers.runs import make
from tests.helpers.toy import task_of

CLASSES, IMAGES, SIDE = 3, 4, 12
CONFIG = """
name: views
data: {{source: folder, uri: {folder}/images, image_size: 12}}
labels: {{per_class: 2}}
pretrain: {{steps: 1, batch_size: 8, contrast_group: 8, learning_rate: 1e-3}}
diffusion:
  model: {{patch_size: 4, dim: 16, depth: 2, heads: 2}}
  steps: 1
  batch_size: 8
  learning_rate: 1e-3
generate: {{images_per_class: 40, indices_per_shard: 40}}
retrain: {{images_per_class: 40}}
output: {folder}/output
"""


@pytest.fixture
def task(tmp_path):
    """The task of the augmented images of a folder of which the labels are drawn."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for n in range(IMAGES):
            image = Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
            image.save(folder / f"{n}.png")
    path = tmp_path / "views.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    config = load_config(path)
    make(config, "labels")
    store, node = Store(config.output), flow(config)["augmented"]
    return task_of(node, store, config.compute)


def labelled(task):
    """The paths of the labelled images of each class, in the order of the list."""
    table = pq.read_table(task.inputs["labels"].local_file("labels.parquet"))
    rows = pq.read_table(task.inputs["index"].local_file("index.parquet"))
    uris = dict(zip(rows["id"].to_pylist(), rows["uri"].to_pylist(), strict=True))
    paths = [[] for _ in range(CLASSES)]
    for identifier, label in zip(*table.to_pydict().values(), strict=True):
        paths[label].append(uris[identifier].removeprefix("file://"))
    return paths


def views(task):
    """The published views (n, C, H, W) of the only shard, and their ids."""
    unit = {"shard": "all", "indices": [0, 40], "classes": [0, CLASSES]}
    result = augment.AugmentUnit(task, *augment._labelled_images(task))(unit)
    assert result["images"] == 40 * CLASSES
    table = pq.read_table(task.out.local_file(task.out.shards()["all"]["file"]))
    found = [np.asarray(Image.open(io.BytesIO(data.as_py()))) for data in table["image"]]
    return np.stack(found).transpose(0, 3, 1, 2), table["id"].to_pylist()


def expected(images):
    """The views of images (n, H, W, C) uint8 by the augmentation itself, all of them at once."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    moved = random_views(x, StepRandom(0, 0, 0, len(x)), "view", 1.0)
    return ((moved.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def in_turn(paths):
    """The class's images, each in its turn, for 40 indices of each class: index by index."""
    return [np.asarray(Image.open(paths[c][i % len(paths[c])])) for i in range(40) for c in range(CLASSES)]


def test_each_view_is_of_its_classes_labelled_images_in_turn(task):
    found, ids = views(task)
    assert ids[:4] == ["aug-00000-0000000", "aug-00001-0000000", "aug-00002-0000000", "aug-00000-0000001"]
    assert len(ids) == 120 > augment.VIEWS  # made in two parts
    np.testing.assert_array_equal(found, expected(in_turn(labelled(task))))


def test_classes_beyond_the_first_thousand_have_views_of_their_own(task):
    unit = augment.AugmentUnit(task, *augment._labelled_images(task))
    drawn, images = [], np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE, 3), np.uint8)
    unit._images = lambda pairs: images
    real = unit._views
    unit._views = lambda *given: drawn.append(real(*given)) or drawn[-1]
    for first in (0, 1000):
        unit({"shard": f"c{first}", "indices": [0, 4], "classes": [first, first + 2]})
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)


def test_no_image_but_the_labelled_ones_is_read(task):
    paths = labelled(task)
    kept = {path for of_class in paths for path in of_class}
    others = [path for path in Path(paths[0][0]).parents[1].rglob("*.png") if str(path) not in kept]
    assert len(others) == CLASSES * (IMAGES - 2)
    for path in others:
        path.unlink()
    np.testing.assert_array_equal(views(task)[0], expected(in_turn(paths)))


def test_the_next_image_of_the_class_stands_in_for_an_unreadable_one(task):
    paths = labelled(task)
    whole = Path(paths[1][0]).read_bytes()
    Path(paths[1][0]).write_bytes(whole[: len(whole) // 2])
    paths[1] = paths[1][1:]
    np.testing.assert_array_equal(views(task)[0], expected(in_turn(paths)))


def test_a_class_without_a_readable_image_is_named(task):
    for path in labelled(task)[2]:
        Path(path).write_bytes(b"")
    with pytest.raises(Exception, match="labels: no labelled image of class class2 can be read"):
        views(task)


def test_a_class_without_a_labelled_image_is_named(task):
    path = task.inputs["labels"].local_file("labels.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 4), path)
    with pytest.raises(ConfigError, match="class class2 has no labelled image to augment"):
        views(task)
