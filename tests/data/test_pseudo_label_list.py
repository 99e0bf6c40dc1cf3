"""Pseudo-labels from a table of the user's: joined by id, and refused in one line where they do not fit."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.data.pseudo_label_list import read_pseudo_label_list

CLASSES = ["oak", "ash"]
INDEX = pa.table({"id": ["a", "b", "c", "v"], "split": ["train", "train", "train", "validation"]})
ROWS = ["c,ash,0.25", "a,oak,1", "b,1,0.5"]


def write(folder, rows, header="id,label,confidence"):
    (folder / "table.csv").write_text("\n".join([header, *rows]) + "\n")
    return str(folder / "table.csv")


def test_rows_join_by_id_whatever_their_order_and_labels_are_names_or_ids(tmp_path):
    found = read_pseudo_label_list(write(tmp_path, [*ROWS, "v,oak,0.75"]), INDEX, CLASSES)
    assert found.to_pylist() == [
        {"id": "c", "split": "train", "label": 1, "class_name": "ash", "confidence": 0.25},
        {"id": "a", "split": "train", "label": 0, "class_name": "oak", "confidence": 1.0},
        {"id": "b", "split": "train", "label": 1, "class_name": "ash", "confidence": 0.5},
        {"id": "v", "split": "validation", "label": 0, "class_name": "oak", "confidence": 0.75},
    ]


def test_a_parquet_table_with_more_columns_and_numbers_as_labels_is_the_same(tmp_path):
    table = pa.table(
        {"more": [1, 2, 3], "id": ["c", "a", "b"], "label": [1, 0, 1], "confidence": [0.25, 1.0, 0.5]}
    )
    pq.write_table(table, tmp_path / "table.parquet")
    one = read_pseudo_label_list(str(tmp_path / "table.parquet"), INDEX, CLASSES)
    assert one.equals(read_pseudo_label_list(write(tmp_path, ROWS), INDEX, CLASSES))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS[:2], "1 of 3 training images have no row, the first is 'b'"),
        ([*ROWS, "zz,oak,1"], "no image 'zz', 1 such rows"),
        ([*ROWS, "a,oak,1"], "'a' has 2 rows"),
        ([*ROWS[:2], "b,elm,1"], "'b': unknown class 'elm'"),
        ([*ROWS[:2], "b,-1,1"], "'b': class -1 stands for an unknown one"),
        ([*ROWS[:2], "b,oak,1.5"], "confidence 1.5 of 'b'"),
        ([*ROWS[:2], "b,oak,"], "row 3: confidence None of 'b'"),
        ([*ROWS[:2], "b,,1"], "row 3 ('b') has no label, 1 such rows; fill them in or remove them"),
        ([ROWS[0], ",oak,1", ",oak,1"], "row 2 has no id, 2 such rows; fill them in or remove them"),
        ([], "has no rows"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, rows, said):
    with pytest.raises(ValueError) as refused:
        read_pseudo_label_list(write(tmp_path, rows), INDEX, CLASSES)
    assert said in str(refused.value) and "table.csv" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": ["c", None, "b"]}, "row 2 has no id, 1 such rows"),
        ({"label": ["ash", "oak", None]}, "row 3 ('b') has no label, 1 such rows"),
        ({"label": [1, None, 1]}, "row 2 ('a') has no label, 1 such rows"),
        ({"confidence": [0.25, float("nan"), 0.5]}, "row 2: confidence nan of 'a'"),
        ({"confidence": [None, 1.0, 0.5]}, "row 1: confidence None of 'c'"),
    ],
)
def test_nulls_and_nan_in_a_parquet_table_are_refused_with_their_row(tmp_path, change, said):
    columns = {"id": ["c", "a", "b"], "label": ["ash", "oak", "ash"], "confidence": [0.25, 1.0, 0.5]}
    pq.write_table(pa.table(columns | change), tmp_path / "table.parquet")
    with pytest.raises(ValueError) as refused:
        read_pseudo_label_list(str(tmp_path / "table.parquet"), INDEX, CLASSES)
    assert said in str(refused.value) and "table.parquet" in str(refused.value)


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="lacks the column confidence"):
        read_pseudo_label_list(write(tmp_path, ["a,oak"], "id,label"), INDEX, CLASSES)
