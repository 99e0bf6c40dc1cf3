"""Images in Parquet files as Hugging Face writes them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.data.index import read_bytes
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
