"""What reading a source on an object store moves over the network."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.data.class_ranges import image_columns
from dpt_ray.data.index import read_bytes
from dpt_ray.data.parquet import index_parquet
from dpt_ray.data.shards import read_shard_columns, write_images
from dpt_ray.data.tar import index_tar
from dpt_ray.store.artifact import Store
from dpt_ray.store.filesystem import SkippingCache, open_exact, open_skipping

random = np.random.default_rng(0)


@pytest.fixture
def moved(s3_bucket, monkeypatch):
    """The bytes of each object that was asked for."""
    import s3fs

    sizes, call = [], s3fs.S3FileSystem._call_s3

    async def counting(self, method, *args, **kwargs):
        answer = await call(self, method, *args, **kwargs)
        if method == "get_object":
            sizes.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counting)
    return sizes


def one_by_one(do, shards):
    """As tasks of a cluster: many shards at a time."""
    return map(do, shards)


def tar_of(count, size):
    """A tar of so many random images, each with a label, and the images."""
    images = {f"{k:04d}": random.bytes(size) for k in range(count)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, image in images.items():
            for name, data in ((f"{key}.cls", b"0"), (f"{key}.jpg", image)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue(), images


def test_the_headers_of_a_tar_of_photographs_are_what_is_read_of_it(s3_bucket, moved):
    uri, fs = s3_bucket
    data, images = tar_of(60, 300_000)
    fs.pipe_file(f"{uri}/a.tar", data)
    index, _ = index_tar(uri, ["x"], each=one_by_one)
    assert index["id"].to_pylist() == list(images) and index["label"].to_pylist() == [0] * 60
    assert sum(moved) < 0.25 * len(data)
    moved.clear()
    assert read_bytes(index.slice(20, 10)) == list(images.values())[20:30]
    assert sum(moved) == 10 * 300_000


def test_a_tar_of_small_images_takes_few_requests(s3_bucket, moved):
    uri, fs = s3_bucket
    data, images = tar_of(500, 2_000)
    fs.pipe_file(f"{uri}/a.tar", data)
    assert index_tar(uri, ["x"], each=one_by_one)[0]["id"].to_pylist() == list(images)
    assert len(moved) <= 4 and sum(moved) <= 1.1 * len(data)


def test_a_unit_of_a_parquet_file_moves_its_row_groups_and_indexing_no_image(s3_bucket, moved):
    uri, fs = s3_bucket
    images = [{"bytes": random.bytes(20_000), "path": f"{k}.jpg"} for k in range(320)]
    table = pa.table({"image": images, "label": [k % 2 for k in range(320)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=64)
    fs.pipe_file(f"{uri}/train.parquet", buffer.getvalue())
    index, _ = index_parquet(uri, ["a", "b"])
    assert len(index) == 320 and sum(moved) < 0.05 * buffer.tell()
    moved.clear()
    assert read_bytes(index.slice(64, 128)) == [image["bytes"] for image in images[64:192]]
    assert sum(moved) <= 1.2 * 128 * 20_000


def test_a_file_is_read_as_it_is_whatever_parts_are_moved(s3_bucket, moved, monkeypatch):
    uri, fs = s3_bucket
    data = random.bytes(5_000)
    fs.pipe_file(f"{uri}/a", data)
    for name, value in (("SMALL", 64), ("LARGE", 256), ("FAR", 128)):
        monkeypatch.setattr(SkippingCache, name, value)
    opened = (open_skipping(f"{uri}/a"), open_exact(f"{uri}/a"), io.BytesIO(data))
    with opened[0] as file, opened[1] as exact, opened[2] as expected:
        for place, size in ((0, 10), (200, 300), (3, 7), (4_000, 1), (4_001, 900), (4_990, 50), (6_000, 4)):
            found = [(each.seek(place) and None) or each.read(size) for each in (file, exact, expected)]
            assert found[0] == found[1] == found[2]
        assert file.seek(-10, io.SEEK_END) == 4_990 and file.read() == data[-10:]


def test_the_columns_of_an_image_shard_are_read_without_its_images(s3_bucket, moved):
    samples = Store(s3_bucket[0]).artifact("samples", "a")
    unit = {"shard": "a", "indices": [0, 40], "classes": [0, 5]}
    noise = list(random.integers(0, 256, (200, 64, 64, 3), np.uint8))  # 12 KB each as PNG

    shard = samples.publish_shard(
        "a", ".parquet", 200, lambda path: write_images(path, noise, image_columns("gen", unit))
    )
    moved.clear()
    table = read_shard_columns(samples, shard, ["id", "class", "index"])
    assert table["class"].to_pylist() == [0, 1, 2, 3, 4] * 40 and sum(moved) < 0.1 * shard["bytes"]
