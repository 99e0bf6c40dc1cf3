"""All images of an artifact, decoded by this process or by others beside it."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dpt_ray.data import decoded, units
from dpt_ray.data.crops import Crop
from dpt_ray.data.sources import INDEXERS
from dpt_ray.store.artifact import Artifact
from tests.helpers.crashes import CRASHES, crashing
from tests.helpers.images import encoded

IMAGES, CROP = 21, Crop("adm", 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of eleven units, two each; the sixth one is damaged."""
    monkeypatch.setattr(units, "ROWS", 2)
    folder = tmp_path / "images" / "train" / "oak"
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        (folder / f"{number:02d}.png").write_bytes(encoded(np.full((8, 9, 3), 10 * number, np.uint8)))
    (folder / "05.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def index(folder, tmp_path):
    return indexed(tmp_path / "images", tmp_path / "index")


def indexed(images, out):
    index = Artifact(str(out))
    index.publish({"units": units.write_index(index, INDEXERS["folder"](str(images))[0])})
    return index


def read(index):
    """The first value of each image by id, in order."""
    parts = list(decoded.iterate_pixels(index, CROP, "RGB"))
    return {name: image.flat[0] for ids, pixels in parts for name, image in zip(ids, pixels, strict=True)}


def test_other_processes_decode_the_same_in_the_same_order(index, monkeypatch):
    here = read(index)
    assert list(here.values()) == [10 * number for number in range(IMAGES) if number != 5]
    monkeypatch.setattr(decoded, "MANY", 2)
    beside = read(index)
    assert beside == here and list(beside) == list(here)


def test_of_an_image_that_crashes_its_decoder_only_that_one_is_lost(folder, tmp_path, monkeypatch):
    crash = folder / "08.png"
    crash.write_bytes(crash.read_bytes() + CRASHES["SIGSEGV"])
    crashing(monkeypatch.setenv, tmp_path)
    monkeypatch.setattr(decoded, "MANY", 2)
    found = read(indexed(tmp_path / "images", tmp_path / "index"))
    assert list(found.values()) == [10 * number for number in range(IMAGES) if number not in (5, 8)]


def test_an_image_at_which_the_process_is_killed_ends_the_reading_by_name(folder, tmp_path, monkeypatch):
    killed = folder / "08.png"
    killed.write_bytes(killed.read_bytes() + CRASHES["SIGKILL"])
    crashing(monkeypatch.setenv, tmp_path)
    monkeypatch.setattr(decoded, "MANY", 2)
    with pytest.raises(MemoryError, match=r"^image train/oak/08: the process that decodes it was killed"):
        read(indexed(tmp_path / "images", tmp_path / "index"))


def test_a_reader_that_stops_early_leaves_no_process(index, monkeypatch):
    monkeypatch.setattr(decoded, "MANY", 2)
    parts = decoded.iterate_pixels(index, CROP, "RGB")
    next(parts)
    assert multiprocessing.active_children()
    parts.close()
    assert not multiprocessing.active_children()


def test_what_is_ahead_is_bounded_and_in_order():
    taken = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        results = decoded.ahead(pool, lambda number: -number, items(), 2)
        assert next(results) == 0 and len(taken) == 3
        assert list(results) == [-number for number in range(1, 10)]
