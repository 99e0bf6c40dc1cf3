"""Moments read row by row, from shards of this machine, of a file system in memory and of S3."""

import os
import threading
import time
import uuid
from concurrent import futures

import numpy as np
import pytest

from dpt_ray.data.moments import MomentsReader, read_moment_ids
from dpt_ray.data.shards import write_moments
from dpt_ray.store import cache
from dpt_ray.store.artifact import Artifact
from dpt_ray.training.order import ShardWindows

SIZES = [4, 0, 3, 5, 2, 4]
SHAPE = (2, 4, 3, 3)
IDS = [f"image-{row}" for row in range(sum(SIZES))]
VALUES = np.random.default_rng(0).normal(size=(len(IDS), *SHAPE)).astype(np.float16)


def publish(uri):
    """The moments above, shard by shard as `extract` publishes them (an empty one has another width)."""
    artifact, shards, start = Artifact(uri), [], 0
    for key, size in enumerate(SIZES):
        rows = slice(start, start + size)
        ids, values = IDS[rows], VALUES[rows] if size else np.zeros((0, 1), np.float16)

        def write(path, ids=ids, values=values):
            write_moments(path, ids, values)

        shards.append(artifact.publish_shard(f"unit-{key}", ".arrow", size, write))
        start += size
    artifact.publish({"shape": list(SHAPE), "shards": shards})
    return artifact


def copies():
    """The keys of the shards that have a copy on this node."""
    files = (name for _, _, names in os.walk(cache.folder()) for name in names)  # also while some are removed
    return {name.split(".")[0] for name in files if name.endswith(".arrow")}


@pytest.fixture(params=["local", "memory"])
def moments(request, node, tmp_path):
    return publish(str(tmp_path / "moments") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def remote(node):
    return publish(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def reader(remote):
    opened = MomentsReader(remote)
    yield opened
    opened.close()


def downloads(remote, monkeypatch):
    """The shards whose download was begun, in that order."""
    begun = []
    original = type(remote.fs).get_file

    def counted(self, source, *arguments, **more):
        begun.append(source.rpartition("/")[2].split(".")[0])
        return original(self, source, *arguments, **more)

    monkeypatch.setattr(type(remote.fs), "get_file", counted)
    return begun


def test_rows_come_in_the_order_asked_for_whichever_shard_they_are_in(moments):
    reader = MomentsReader(moments)
    reader.hold(range(len(SIZES)))
    reader.wait()
    rows = np.random.default_rng(1).permutation(np.repeat(np.arange(len(IDS)), 2))
    np.testing.assert_array_equal(reader.rows(rows), VALUES[rows])
    assert len(reader) == len(IDS)
    reader.close()


def test_the_ids_are_those_of_the_rows_and_reading_them_copies_no_shard(moments):
    assert read_moment_ids(moments).to_pylist() == IDS
    assert copies() == set()


def test_no_more_than_the_shards_held_is_on_the_node(reader):
    for shards in ([0, 2], [2, 3], [5, 4], [0, 1, 2, 3, 4, 5], [3]):
        reader.hold(shards)
        reader.wait()
        assert copies() == {f"unit-{shard}" for shard in shards if SIZES[shard]}


def test_rows_of_a_shard_that_another_process_has_let_go_are_still_there(remote, reader):
    reader.hold([0])
    reader.wait()
    other = MomentsReader(remote)
    other.hold([0])
    other.wait()
    other.hold([2])
    assert "unit-0" not in copies()
    np.testing.assert_array_equal(reader.rows(np.arange(4)), VALUES[:4])
    other.close()


def test_training_in_windows_reads_each_shard_once_an_epoch_ahead_of_its_use(remote, reader, monkeypatch):
    begun = downloads(remote, monkeypatch)
    order = ShardWindows(0, 2, reader.sizes, 2)
    steps = len(IDS) // 2
    for step in range(steps):
        reader.hold(order.shards(step))
        np.testing.assert_array_equal(reader.rows(order(step)), VALUES[order(step)])
    reader.wait()
    fetched = begun[: np.count_nonzero(SIZES)]
    assert sorted(fetched) == [f"unit-{shard}" for shard in np.flatnonzero(SIZES)]
    assert len(begun) <= len(fetched) + 2 * 2  # and the next epoch's first windows, which are awaited


def test_a_step_goes_on_while_the_next_window_is_on_its_way(remote, reader, monkeypatch):
    may_go_on = threading.Event()
    original = type(remote.fs).get_file

    def slow(self, source, *arguments, **more):
        if "unit-5" in source:
            assert may_go_on.wait(20)
        return original(self, source, *arguments, **more)

    monkeypatch.setattr(type(remote.fs), "get_file", slow)
    reader.hold([0, 5])
    np.testing.assert_array_equal(reader.rows(np.arange(4)), VALUES[:4])  # would wait for ever
    may_go_on.set()
    np.testing.assert_array_equal(reader.rows(np.array([14])), VALUES[14:15])


def test_a_shard_let_go_on_its_way_is_removed_when_it_has_come(remote, reader, monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()
    original = type(remote.fs).get_file

    def slow(self, *arguments, **more):
        begun.set()
        assert may_go_on.wait(20)
        return original(self, *arguments, **more)

    monkeypatch.setattr(type(remote.fs), "get_file", slow)
    reader.hold([0])
    assert begun.wait(20)
    on_its_way = reader._blocks[0]
    reader.hold([])
    may_go_on.set()
    reader.hold([2])
    reader.wait()
    futures.wait([on_its_way], 20)  # else it may come after the last look
    end = time.monotonic() + 20
    while copies() != {"unit-2"} and time.monotonic() < end:
        time.sleep(0.01)
    assert copies() == {"unit-2"}


def test_a_download_that_breaks_off_is_an_error_where_its_rows_are_wanted(remote, reader, monkeypatch):
    def breaks(self, source, target, **more):
        raise ConnectionError("gone")

    monkeypatch.setattr(type(remote.fs), "get_file", breaks)
    reader.hold([0, 2])
    with pytest.raises(ConnectionError, match="gone"):
        reader.rows(np.array([1]))
    assert copies() == set()


def test_a_disk_that_is_too_small_is_told_before_anything_is_copied(remote, reader, node, monkeypatch):
    begun = downloads(remote, monkeypatch)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: cache.shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ValueError, match=rf"{node}.*5 files.* has 0\.0 GB free; .*set TMPDIR") as error:
        reader.hold(range(len(SIZES)))
    assert "\n" not in str(error.value) and begun == []


def test_shards_and_ids_are_read_from_s3(node, s3_bucket):
    moments = publish(f"{s3_bucket[0]}/out")
    assert read_moment_ids(moments).to_pylist() == IDS
    assert copies() == set()
    reader = MomentsReader(moments)
    reader.hold([0, 3])
    rows = np.array([9, 0, 3, 11])
    np.testing.assert_array_equal(reader.rows(rows), VALUES[rows])
    reader.hold([2])
    reader.wait()
    assert copies() == {"unit-2"}
    reader.close()
