from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from dpt_ray.data.index import SCHEMA, build_index, encode_labels, validate_index
from dpt_ray.data.splits import assign_splits, stratified_split


def index_of(ids, labels=None, splits=None) -> pa.Table:
    n = len(ids)
    columns = [
        ids,
        [f"file:///data/{i}.png" for i in ids],
        [0] * n,
        [10] * n,
        splits or ["train"] * n,
        labels if labels is not None else [0] * n,
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)


def test_an_index_of_more_rows_than_one_chunk_keeps_their_order() -> None:
    n = 70_000
    rows = ((f"image-{i}", "file:///x.tar", i, 1, "train", str(i % 3)) for i in range(n))
    table, classes = build_index(rows)
    assert classes == ["0", "1", "2"]
    assert table.schema.equals(SCHEMA)
    assert table["offset"].to_pylist() == list(range(n))
    assert table["label"].to_pylist() == [i % 3 for i in range(n)]


@pytest.mark.parametrize(
    ("values", "classes", "ids", "names"),
    [
        (["dog", "cat", None, "", "dog"], None, [1, 0, None, None, 1], ["cat", "dog"]),
        (["1", "0", "-1", None], None, [1, 0, None, None], ["0", "1"]),
        (["3", "0"], ["0", "1", "2", "3"], [3, 0], ["0", "1", "2", "3"]),
        (["1.0", "0.0"], None, [1, 0], ["0", "1"]),
        (["1", "dog"], ["cat", "dog"], [1, 1], ["cat", "dog"]),
        (["5", "7"], ["7", "5"], [1, 0], ["7", "5"]),
        ([None, None], None, [None, None], []),
        (["3000000", "7", "-1", "7.0"], None, [1, 0, None, 0], ["7", "3000000"]),
        (["900000000001", "007"], None, [1, 0], ["7", "900000000001"]),
        (["20", "3"], None, [1, 0], ["3", "20"]),
        (["2", "1"], ["1", "2"], [1, 0], ["1", "2"]),
        (["dog", "-1", "cat", "7"], None, [2, None, 1, 0], ["7", "cat", "dog"]),
    ],
)
def test_labels_are_class_names_or_numbers(values, classes, ids, names) -> None:
    encoded, found = encode_labels(pa.chunked_array([pa.array(values, pa.string())]), classes)
    assert (encoded.to_pylist(), found) == (ids, names)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["1", "2"], r'up to 2, and 1 of them have no image, the first is 0; .*data\.classes=\["1", "2"\]'),
        (["0", "3"], r'up to 3, and 2 of them have no image, the first is 1; .*data\.classes=\["0", "3"\]'),
        (["19", "3"], "up to 19, and 18 of them have no image, the first is 0"),
    ],
)
def test_numbers_with_gaps_are_neither_filled_with_empty_classes_nor_shifted(values, said) -> None:
    with pytest.raises(ValueError, match=said):
        encode_labels(pa.chunked_array([pa.array(values)]))


def test_a_class_where_the_images_have_none_is_answered_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'rose': the images come without classes; check data\.uri, or"):
        encode_labels(pa.chunked_array([["rose"]]), [])


@pytest.mark.parametrize("value", ["cow", "2", "1.5"])
def test_a_label_outside_the_classes_is_refused(value) -> None:
    with pytest.raises(ValueError, match=f"unknown class '{value}'.*0 to 1"):
        encode_labels(pa.chunked_array([[value]]), ["cat", "dog"])


@pytest.mark.parametrize("value", ["1", "8", "cat"])
def test_where_numbers_are_names_a_rank_is_none(value) -> None:
    with pytest.raises(ValueError, match=rf"unknown class '{value}'.* names \(7, 3000000, \.\.\.\)$"):
        encode_labels(pa.chunked_array([[value]]), ["7", "3000000"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            index_of(["a", "b", "a", "c", "b"]),
            r"several images; .*rename one, .*: a, b \(2 in all\)",
        ),
        (index_of(["a", "b"], splits=["train", "dev"]), "unknown split.*: b"),
        (index_of(["a", "b"], labels=[0, 2]), "label outside 0 to 1: b"),
        (index_of(["a", None]), "1 nulls in column id"),
        (index_of([]), "no images"),
        (index_of(["a"]).drop(["label"]), "split string; it needs .*, label int32"),
        (index_of(["a"]).set_column(3, SCHEMA.field(3), [pa.array([-2])]), "length below -1: a"),
    ],
)
def test_a_broken_index_is_refused_naming_the_rows(table, message) -> None:
    with pytest.raises(ValueError, match=message):
        validate_index(table, ["x", "y"])


def test_unknown_labels_are_allowed_and_equal_class_names_are_not() -> None:
    validate_index(index_of(["a"], labels=[None]), [])
    with pytest.raises(ValueError, match="same name"):
        validate_index(index_of(["a"]), ["x", "x"])


def test_a_stratified_split_has_exact_sizes_and_every_class_in_proportion() -> None:
    labels = np.random.default_rng(0).choice(5, 1000, p=[0.5, 0.3, 0.1, 0.07, 0.03]).tolist()
    sizes = {"train": 611, "validation": 100, "test": 289}
    splits = stratified_split(labels, sizes, seed=3)
    assert Counter(splits) == sizes
    cells = Counter(zip(labels, splits, strict=True))
    for label, in_class in Counter(labels).items():
        for name, size in sizes.items():
            assert abs(cells[label, name] - in_class * size / 1000) <= 2
    assert splits == stratified_split(labels, sizes, seed=3)
    assert splits != stratified_split(labels, sizes, seed=4)


def test_split_sizes_must_add_up() -> None:
    with pytest.raises(ValueError, match="add up to the 3 images"):
        stratified_split([0, 0, 1], {"train": 2, "test": 2}, seed=0)


def test_assigned_splits_depend_on_ids_only_and_leave_kept_and_unlabelled_images() -> None:
    ids = [f"i{k}" for k in range(200)]
    labels = [None if k < 20 else k % 3 for k in range(200)]
    keep = ids[20:60]
    table = assign_splits(index_of(ids, labels), 50, 60, seed=1, keep_in_train=keep)
    assert table.schema.equals(SCHEMA)
    assert Counter(table["split"].to_pylist()) == {"train": 90, "validation": 50, "test": 60}
    split_of = dict(zip(ids, table["split"].to_pylist(), strict=True))
    assert {split_of[i] for i in ids[:60]} == {"train"}
    backwards = assign_splits(index_of(ids[::-1], labels[::-1]), 50, 60, 1, keep)
    assert backwards["split"].to_pylist() == [split_of[i] for i in ids[::-1]]


def test_splits_are_not_assigned_twice_nor_beyond_what_there_is() -> None:
    with pytest.raises(ValueError, match="already has a test split"):
        assign_splits(index_of(["a", "b"], splits=["train", "test"]), 0, 1, seed=0)
    with pytest.raises(ValueError, match="more than the 2 labelled"):
        assign_splits(index_of(["a", "b"]), 2, 1, seed=0)
