"""Images in Parquet files as Hugging Face writes them."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.data.index import read_bytes, read_row_group
from dpt_ray.data.listing import SPLIT_NAMES
from dpt_ray.data.parquet import index_parquet
from tests.helpers.image_sources import CLASSES, write_parquets


def test_parquet_takes_class_names_from_its_metadata_and_negative_labels_as_unknown(
    tmp_path,
) -> None:
    assert index_parquet(write_parquets(f"{tmp_path}/a"))[1] == CLASSES
    table = pa.table({"img": [{"bytes": b"1", "path": None}, {"bytes": None, "path": None}]})
    pq.write_table(table.append_column("label", pa.array([-1, 0])), tmp_path / "test.parquet")
    index, classes = index_parquet(f"{tmp_path}/test.parquet")
    assert classes == ["0"]
    assert index["id"].to_pylist() == ["test-000000", "test-000001"]
    assert index["label"].to_pylist() == [None, 0]
    assert index["split"].to_pylist() == ["test", "test"]
    assert read_bytes(index) == [b"1", b""]


def test_parquet_ids_are_the_row_and_the_images_own_name_where_it_has_one(tmp_path) -> None:
    images = [{"bytes": b"", "path": "a/n01_3.JPEG"}, {"bytes": b"", "path": None}]
    pq.write_table(pa.table({"image": images}), tmp_path / "train.parquet")
    ids = index_parquet(f"{tmp_path}/train.parquet", ["n01"])[0]["id"].to_pylist()
    assert ids == ["train-000000/n01_3", "train-000001"]


def test_parquet_without_an_image_column_is_refused(tmp_path) -> None:
    pq.write_table(pa.table({"label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="expected one image column"):
        index_parquet(str(tmp_path))


def write_ranked(file, names, labels):
    """A file whose integer labels are ranks in a ClassLabel's names."""
    table = pa.table({"img": [{"bytes": b"1", "path": None}] * len(labels), "label": labels})
    features = {"label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), file)


def test_integers_are_ranks_of_the_published_names_also_where_these_are_numbers(tmp_path) -> None:
    names = sorted(map(str, range(12)))  # "0", "1", "10", "11", "2", ..., as folders are sorted
    write_ranked(tmp_path / "train.parquet", names, [*range(12), -1])
    index, classes = index_parquet(str(tmp_path))
    assert classes == names
    assert index["label"].to_pylist() == [*range(12), None]
    from_one = sorted(map(str, range(1, 13)))
    write_ranked(tmp_path / "train.parquet", from_one, list(range(12)))
    assert index_parquet(str(tmp_path))[0]["label"].to_pylist() == list(range(12))
    # With other names of the user's the integers are ranks among those.
    other = [f"class {number}" for number in range(12)]
    assert index_parquet(str(tmp_path), other)[0]["label"].to_pylist() == list(range(12))


def test_a_label_beyond_the_published_names_and_one_of_several_are_refused(tmp_path) -> None:
    write_ranked(tmp_path / "train.parquet", ["a", "b"], [0, 2])
    with pytest.raises(ValueError, match=r"train.parquet has label 2, and its metadata names 2 classes"):
        index_parquet(str(tmp_path))
    write_ranked(tmp_path / "train.parquet", ["a", "b"], [[0], [0, 1]])
    with pytest.raises(ValueError, match=r"train.parquet has labels of type list.*; write one name"):
        index_parquet(str(tmp_path))


def test_a_number_that_is_none_is_no_class(tmp_path) -> None:
    labels = pa.array([0.0, float("nan"), 1.0, None])
    table = pa.table({"img": [{"bytes": b"1", "path": None}] * 4, "label": labels})
    pq.write_table(table, tmp_path / "train.parquet")
    index, classes = index_parquet(str(tmp_path))
    assert (classes, index["label"].to_pylist()) == (["0", "1"], [0, None, 1, None])


@pytest.mark.parametrize("names", [("train-0", "eval-0"), ("test-0", "val-0", "dev-0")])
def test_files_without_a_split_beside_others_with_one_are_refused(tmp_path, names) -> None:
    for name in names:
        write_ranked(tmp_path / f"{name}.parquet", ["a", "b"], [0, 1])
    with pytest.raises(ValueError, match=rf"others none: {names[-1]}.parquet; .* data.splits=.(eval|dev): "):
        index_parquet(str(tmp_path))
    named = SPLIT_NAMES | {"eval": "validation", "dev": "validation"}
    assert index_parquet(str(tmp_path), split_names=named)[0].num_rows == 2 * len(names)


def test_files_beside_a_test_split_alone_are_training_images(tmp_path) -> None:
    for name in ("part-0", "test-0"):
        write_ranked(tmp_path / f"{name}.parquet", ["a", "b"], [0, 1])
    assert index_parquet(str(tmp_path))[0]["split"].to_pylist() == ["train", "train", "test", "test"]


def test_threads_read_a_row_group_once(tmp_path, monkeypatch) -> None:
    write_ranked(tmp_path / "train.parquet", ["a", "b"], [0, 1] * 8)
    index, read = index_parquet(str(tmp_path))[0], []

    def slow(uri, group):
        read.append(group)
        time.sleep(0.05)
        return read_row_group(uri, group)

    monkeypatch.setattr("dpt_ray.data.index._of_last_row_group", lru_cache(maxsize=1)(slow))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda row: read_bytes(index.slice(row, 1))[0], range(16))) == {b"1"}
    assert read == [0]
