import logging

import numpy as np
import pytest
import torch

from dpt_ray.config import ConfigError
from dpt_ray.data import raw_images
from dpt_ray.data.crops import Crop
from dpt_ray.data.decoded import iterate_pixels
from dpt_ray.data.raw_images import RawImages, RowGroups
from dpt_ray.data.sources import INDEXERS
from dpt_ray.data.units import read_index, write_index
from dpt_ray.store.artifact import Artifact
from dpt_ray.training.prefetch import prefetch
from tests.helpers.image_sources import IMAGES, WRITERS, write, write_folder

CROP = Crop("adm", 4)
ANY_ORDER = np.array([[9, 0, 4], [4, 2, 7]])


def published(kind, root, folder):
    """The index of a source as an artifact in a local folder."""
    table, _ = INDEXERS[kind](WRITERS[kind](root))
    index = Artifact(str(folder))
    index.publish({"units": write_index(index, table)})
    return index


def streamed(index):
    """The pixels of all images by id, as the other stages read them."""
    return {
        name: image
        for names, pixels in iterate_pixels(index, CROP, "RGB")
        for name, image in zip(names, pixels, strict=True)
    }


def check(index):
    rows, expected = read_index(index), streamed(index)
    images = RawImages(rows, CROP, "RGB", 0.0)
    assert len(images) == len(expected) == len(IMAGES)
    found = images[ANY_ORDER]
    assert found.dtype == np.uint8
    assert found.shape == (2, 3, 4, 4, 3)
    for row, pixels in zip(ANY_ORDER.flatten().tolist(), found.reshape(-1, 4, 4, 3), strict=True):
        assert np.array_equal(pixels, expected[rows["id"][row].as_py()])
    assert np.array_equal(images[np.array(3)], images[np.array([3])][0])
    assert images[np.empty((0, 2), int)].shape == (0, 2, 4, 4, 3)
    assert not images.unreadable
    return images


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_in_any_order_are_the_pixels_that_are_streamed(kind, root, tmp_path):
    check(published(kind, root, tmp_path / "index"))


@pytest.mark.parametrize("kind", WRITERS)
def test_an_object_store_serves_a_process_that_was_forked_from_one_that_used_it(kind, s3_bucket, tmp_path):
    images = check(published(kind, s3_bucket[0], tmp_path / "index"))
    batches = prefetch(lambda step: {"pixels": torch.from_numpy(images[ANY_ORDER])}, range(1), processes=1)
    [(batch, _)] = batches
    assert np.array_equal(batch["pixels"].numpy(), images[ANY_ORDER])


def test_grey_images_have_one_channel(tmp_path):
    index = published("folder", str(tmp_path / "images"), tmp_path / "index")
    assert RawImages(read_index(index), CROP, "L", 0.0)[np.arange(2)].shape == (2, 4, 4, 1)


@pytest.fixture
def broken(tmp_path):
    """Rows of which the third and the last two cannot be read."""
    table, _ = INDEXERS["folder"](write_folder(str(tmp_path)))
    for row, data in ((2, b"no image"), (8, b""), (9, IMAGES["image_0"][2][:40])):
        write(table["uri"][row].as_py(), data)
    return table


def test_the_next_row_takes_the_place_of_an_unreadable_image(broken, caplog):
    images = RawImages(broken, CROP, "RGB", 0.3)
    with caplog.at_level(logging.WARNING, "dpt_ray"):
        found = images[np.array([1, 2, 8, 9, 2])]
    assert np.array_equal(found, images[np.array([1, 3, 0, 0, 3])])
    ids = [broken["id"][row].as_py() for row in (2, 8, 9)]
    assert sorted(images.unreadable) == sorted(ids)
    assert images.unreadable[ids[1]] == "empty: zero bytes"
    assert len([record for record in caplog.records if ids[0] in record.getMessage()]) == 1


@pytest.mark.parametrize("most", [0.0, 0.25])
def test_too_many_unreadable_images_are_an_error_that_names_them(broken, most):
    images = RawImages(broken, CROP, "RGB", most)
    with pytest.raises(
        ConfigError, match=rf"max_bad_fraction: {most:g}, but at least \d of 10 .*not an image"
    ):
        images[np.arange(10)]


def test_images_of_which_none_can_be_read_are_an_error_at_any_limit(broken):
    with pytest.raises(ConfigError, match="at least 1 of 1 images"):
        RawImages(broken.slice(8, 1), CROP, "RGB", 1.0)[np.array([0])]


def test_a_crop_that_does_not_fit_is_no_unreadable_image(broken):
    with pytest.raises(ValueError, match=r"^image .*: crop kind none needs images of 7 x 7"):
        RawImages(broken, Crop("none", 7), "RGB", 1.0)[np.array([0])]


def test_row_groups_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    table, _ = INDEXERS["parquet"](WRITERS["parquet"](str(tmp_path)))  # row groups of 3
    read, original = [], raw_images.read_row_group

    def counting(uri, group):
        read.append((uri.rpartition("/")[2].split("-")[0], group))
        return original(uri, group)

    monkeypatch.setattr(raw_images, "read_row_group", counting)
    images = RawImages(table, CROP, "RGB", 0.0)
    for _ in range(2):
        images[np.array([0, 9, 3, 1])]
    assert sorted(read) == [("train", 0), ("train", 1), ("validation", 0)]

    uri = table["uri"][0].as_py()
    sizes = [original(uri, group).nbytes for group in range(3)]
    groups = RowGroups(sizes[0] + sizes[1])
    del read[:]
    for group in (0, 1, 0, 2, 0, 1):  # 2 takes the place of 1, the longest unused
        groups.images(uri, group)
    assert [group for _, group in read] == [0, 1, 2, 1]
