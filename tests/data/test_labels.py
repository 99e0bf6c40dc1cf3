import json
from collections import Counter
from itertools import pairwise
from unicodedata import normalize

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.data.index import SCHEMA
from dpt_ray.data.labels import class_names, draw_labels, read_label_list
from dpt_ray.data.parquet import index_parquet

CLASSES = ["n01", "n02", "n03"]


def imagenet(n_per_class: int = 6) -> pa.Table:
    """n01/n01_0 ... as files of a folder; image number 5 of each class is a test image."""
    rows = [(label, k) for label in range(3) for k in range(n_per_class)]
    ids = [f"train/{CLASSES[label]}/{CLASSES[label]}_{k}" for label, k in rows]
    columns = [
        ids,
        [f"s3://bucket/{i}.JPEG" for i in ids],
        [0] * len(rows),
        [9] * len(rows),
        ["test" if k == 5 else "train" for _, k in rows],
        [label for label, _ in rows],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)


def rows_of(table: pa.Table) -> set[tuple[str, int]]:
    return {(row["id"], row["label"]) for row in table.to_pylist()}


def test_a_draw_has_n_true_labels_per_class_from_the_train_split() -> None:
    index = imagenet()
    drawn = draw_labels(index, 3, seed=0, classes=CLASSES)
    assert drawn.schema.names == ["id", "label"]
    assert Counter(drawn["label"].to_pylist()) == {0: 3, 1: 3, 2: 3}
    train = {(r["id"], r["label"]) for r in index.to_pylist() if r["split"] == "train"}
    assert rows_of(drawn) <= train


def test_draws_are_nested_and_do_not_depend_on_row_order() -> None:
    index = imagenet(100)
    draws = [rows_of(draw_labels(index, n, seed=7)) for n in range(1, 6)]
    assert all(small < large for small, large in pairwise(draws))
    assert draw_labels(index.take(list(range(299, -1, -1))), 3, seed=7).equals(draw_labels(index, 3, seed=7))
    assert rows_of(draw_labels(index, 5, seed=8)) != draws[4]


def test_images_of_unknown_label_are_not_drawn() -> None:
    index = imagenet()
    unknown = pa.array([None if k % 2 else v for k, v in enumerate(index["label"].to_pylist())])
    index = index.set_column(5, SCHEMA.field(5), [unknown.cast(pa.int32())])
    assert all(int(i[-1]) % 2 == 0 for i in draw_labels(index, 3, seed=0)["id"].to_pylist())


def test_asking_for_more_labels_than_there_are_names_class_and_count() -> None:
    with pytest.raises(ValueError, match="class n01 has 5 labelled training images, 6 per class"):
        draw_labels(imagenet(), 6, seed=0, classes=CLASSES)
    with pytest.raises(ValueError, match="class empty has 0"):
        draw_labels(imagenet(), 1, seed=0, classes=[*CLASSES, "empty"])
    with pytest.raises(ValueError, match="no true labels"):
        nulls = pa.nulls(18, pa.int32())
        draw_labels(imagenet().set_column(5, SCHEMA.field(5), [nulls]), 1, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        draw_labels(imagenet(), 0, seed=0)


def read(tmp_path, text: str, format: str, index=None) -> set[tuple[str, int]]:
    path = tmp_path / "labels.txt"
    path.write_bytes(text.encode())
    return rows_of(read_label_list(str(path), format, index or imagenet(), CLASSES))


EXPECTED = {("train/n02/n02_4", 1), ("train/n01/n01_0", 0)}


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("published", "n02_4.JPEG\nn01_0.JPEG\n"),
        ("published", "n02_4.JPEG\r\n\r\nn01_0.JPEG"),
        ("csv", "id,label\ntrain/n02/n02_4,n02\ntrain/n01/n01_0,n01\n"),
        ("csv", "id,label\r\ntrain/n02/n02_4,1\r\ntrain/n01/n01_0,0\r\n"),
        ("csv", '\ufefflabel,id\nn02,"train/n02/n02_4"\n\nn01,train/n01/n01_0\n'),
    ],
)
def test_a_label_list_is_joined_by_name(tmp_path, format, text) -> None:
    assert read(tmp_path, text, format) == EXPECTED


@pytest.mark.parametrize(
    "key",
    [
        "train/n02/n02_4",
        "train/n02/n02_4.JPEG",
        "./train/n02/n02_4.jpg",
        "/data/photos/train/n02/n02_4.JPEG",
        "/data/photos//train/n02/n02_4",
        "file:///data/photos/train/n02/n02_4.JPEG",
        "n02_4.JPEG",
        "n02_4",
    ],
)
def test_an_image_is_named_by_its_id_path_uri_or_file_name(tmp_path, key) -> None:
    index = in_folder(imagenet(), "file:///data/photos")
    assert read(tmp_path, f"id,label\n{key},n02\n", "csv", index) == {("train/n02/n02_4", 1)}


def in_folder(index: pa.Table, folder: str) -> pa.Table:
    uris = pa.array([f"{folder}/{identifier}.JPEG" for identifier in index["id"].to_pylist()])
    return index.set_column(1, SCHEMA.field(1), uris)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("key", ["train/n02/Vögel ü.png", "Vögel ü.png", "train/n02/Vögel ü"])
def test_letters_with_accents_are_the_same_in_either_form(tmp_path, forms, key):
    listed, stored = forms
    index = imagenet().slice(0, 1)
    name = normalize(stored, "train/n02/Vögel ü")
    index = index.set_column(0, SCHEMA.field(0), [pa.array([name])])
    index = in_folder(index, "file:///photos")
    assert read(tmp_path, f"id,label\n{normalize(listed, key)},n02\n", "csv", index) == {(name, 1)}


def test_a_quotation_mark_that_swallows_the_rest_of_a_long_list_is_told_by_its_line(tmp_path):
    rest = "".join(f"train/n01/n01_{k},n01\n" for k in range(9000))
    with pytest.raises(ValueError, match=r"labels\.txt line 3: field larger .*; close its quotation mark$"):
        read(tmp_path, f'id,label\n{ID},n01\n"train/n02/n02_4,n02\n{rest}', "csv")


def test_an_image_in_a_bucket_is_named_by_its_uri(tmp_path) -> None:
    key = "s3://bucket/train/n02/n02_4.JPEG"
    assert read(tmp_path, f"id,label\n{key},n02\n", "csv") == {("train/n02/n02_4", 1)}


def test_an_image_in_a_shard_is_named_by_its_file(tmp_path) -> None:
    uris = pa.array(["s3://bucket/shard-0.tar"] * imagenet().num_rows)
    index = imagenet().set_column(1, SCHEMA.field(1), uris)
    assert read(tmp_path, "id,label\nn02_4.JPEG,n02\n", "csv", index) == {("train/n02/n02_4", 1)}


def test_an_id_wins_over_a_path_and_a_path_over_a_file_name(tmp_path) -> None:
    ids = ["1.jpg", "1", "a/1", "b/2.png", "b/2"]
    uris = ["s3://b/u.jpg", "s3://b/1.jpg", "s3://b/a/1.jpg", "s3://b/b/2.png.png", "s3://b/b/2.png"]
    columns = [ids, uris, [0] * 5, [9] * 5, ["train"] * 5, [None] * 5]
    index = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)
    text = "id,label\n1.jpg,n01\n1,n02\nb/2.png,n03\n2,n01\n"
    expected = {("1.jpg", 0), ("1", 1), ("b/2.png", 2), ("b/2", 0)}
    assert read(tmp_path, text, "csv", index) == expected


def test_two_names_of_one_image_are_a_repetition(tmp_path) -> None:
    text = f"id,label\n{ID},n01\n{ID}.JPEG,n02\n"
    with pytest.raises(ValueError, match=r"line 3 .class n02. contradicts line 2"):
        read(tmp_path, text, "csv")


def test_a_bare_name_of_several_images_is_refused(tmp_path) -> None:
    other = imagenet().slice(0, 1).set_column(0, SCHEMA.field(0), [pa.array(["copy/n01_0"])])
    other = other.set_column(1, SCHEMA.field(1), [pa.array(["s3://bucket/copy/n01_0.JPEG"])])
    with pytest.raises(ValueError, match=r"'n01_0\.JPEG' could be any of train/n01/n01_0, copy/n01_0"):
        read(tmp_path, "id,label\nn01_0.JPEG,n01\n", "csv", pa.concat_tables([imagenet(), other]))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("tarin/n02/n02_4.JPEG", "train/n02/n02_4"),  # another folder
        ("train/n02/n02_99.JPEG", "train/n02/n02_"),  # another file
        ("n02_4x", "train/n02/n02_4"),
        ("holiday", None),
    ],
)
def test_an_unknown_image_is_answered_with_the_nearest_id(tmp_path, key, nearest) -> None:
    with pytest.raises(ValueError, match=f"line 2: no image '{key}' in the index") as caught:
        read(tmp_path, f"id,label\n{key},n01\n", "csv")
    assert ("did you mean" in str(caught.value)) == (nearest is not None)
    assert (nearest or "") in str(caught.value)


def test_a_published_list_finds_images_inside_tar_shards_by_their_key(tmp_path) -> None:
    index = imagenet()
    uris = pa.array(["s3://bucket/shard-0.tar"] * index.num_rows)
    index = index.set_column(1, SCHEMA.field(1), [uris])
    assert read(tmp_path, "n02_4.JPEG\nn01_0.JPEG\n", "published", index) == EXPECTED


def hugging_face_parquet(tmp_path):
    """An index of Parquet files as ILSVRC/imagenet-1k has them: names of things, and paths that end twice."""
    feature = {"names": ["tench, Tinca tinca", "goldfish"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    paths = [f"n0{k + 1}_{i}_n0{k + 1}.JPEG" for i in range(3) for k in range(2)]
    images = [{"bytes": b"", "path": path} for path in paths]
    table = pa.table({"image": images, "label": [0, 1] * 3}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    return index_parquet(str(tmp_path / "train-00000-of-00001.parquet"))


def test_a_published_list_of_all_classes_joins_hugging_faces_imagenet(tmp_path) -> None:
    index, classes = hugging_face_parquet(tmp_path)
    (tmp_path / "labels.txt").write_text("n02_1.JPEG\nn01_0.JPEG\n")
    found = read_label_list(str(tmp_path / "labels.txt"), "published", index, classes)
    ids = {identifier.rpartition("/")[2]: label for identifier, label in rows_of(found)}
    assert ids == {"n02_1_n02": 1, "n01_0_n01": 0}


def test_a_published_list_of_some_classes_cannot_be_ranked(tmp_path) -> None:
    index, classes = hugging_face_parquet(tmp_path)
    (tmp_path / "labels.txt").write_text("n02_1.JPEG\n")
    with pytest.raises(ValueError, match=r"line 1: unknown class 'n02'.*data\.classes"):
        read_label_list(str(tmp_path / "labels.txt"), "published", index, classes)


ID = "train/n01/n01_0"


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("published", "n01_0.JPEG\nn01_99.JPEG", "line 2: no image 'n01_99'"),
        ("published", "n09_0.JPEG", "line 1: unknown class 'n09'"),
        ("published", "n01_0.JPEG\nn02_1.JPEG\nn01_0.JPEG", "line 3 repeats line 1"),
        ("published", "n01_1.JPEG\nn01_5.JPEG", "line 2: .* is in the test split"),
        ("published", "", "is empty"),
        ("published", "\r\n\r\n", "is empty"),
        ("csv", "id,label\n", "is empty"),
        ("csv", "n01_0,0\n", "line 1: columns .* needs id,label"),
        ("csv", f"id,label\n{ID},n01\n{ID},0\n", "line 3 repeats line 2"),
        ("csv", f"id,label\n{ID},n01\n\n{ID},n02\n", "line 4 .class n02. contradicts line 2"),
        ("csv", f"id,label\n{ID},3\n", "line 2: unknown class '3'.*0 to 2"),
        ("csv", f"id,label\n{ID},-1\n", "line 2: unknown class '-1'"),
        ("csv", f"id,label\n{ID}\n", "line 2: .* has no label; give one"),
        ("csv", f"label,id\nn01,{ID}\nn02\n", "line 3: the row has no id; name its image or remove the line"),
        ("csv", f"id,label\n{ID},n01\n ,n02\n", "line 3: the row has no id"),
        ("csv", "id,label\nnowhere,n01\n", "line 2: no image 'nowhere'"),
        ("json", "[]", "use csv or published"),
    ],
)
def test_a_faulty_label_list_is_refused_naming_the_line(tmp_path, format, text, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, format)


def test_a_file_name_that_two_images_have_is_refused(tmp_path) -> None:
    index = imagenet()
    other = index.slice(0, 1).set_column(0, SCHEMA.field(0), [pa.array(["copy/n01_0"])])
    with pytest.raises(ValueError, match="line 1: 'n01_0' could be any of train/n01/n01_0, copy"):
        read(tmp_path, "n01_0.JPEG", "published", pa.concat_tables([index, other]))


def test_a_list_that_names_classes_1_and_2_has_no_class_0(tmp_path) -> None:
    (tmp_path / "labels.csv").write_text("id,label\na,2\nb,10\nc,1\n")
    assert class_names(str(tmp_path / "labels.csv")) == ["1", "2", "10"]
