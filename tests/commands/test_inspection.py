"""What `dpt init` takes the files of a folder for, and `dpt predict` images with labels of their own."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from dpt_ray.commands.inspection import look
from dpt_ray.commands.predict import list_images
from tests.helpers.image_sources import IMAGES

PICTURE = IMAGES["image_0"][2]


def write_tar(file, labels, folder="."):
    with tarfile.open(file, "w") as tar:
        for number, label in enumerate(labels):
            for suffix, data in (("png", PICTURE), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{folder}/{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def photographs(tmp_path):
    """Four pictures in the folders of two classes."""
    for name in ("cat/0", "cat/1", "dog/0", "dog/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(PICTURE)
    return tmp_path


def test_an_archive_and_photographs_of_another_format_are_told(photographs):
    write_tar(photographs / "BACKUP.TAR", [0])
    for number in range(3):
        (photographs / "cat" / f"{number}.HEIC").write_bytes(b"x")
    found = look(str(photographs), None)
    assert (found.source, found.index.num_rows) == ("folder", 4)
    assert found.notes == ["note: not read are 3 .heic, 1 .tar; convert photographs to JPEG or PNG"]


def test_shards_beside_a_picture_are_the_source(tmp_path):
    write_tar(tmp_path / "A.TAR", [0, 1])
    (tmp_path / "preview.png").write_bytes(PICTURE)
    found = look(str(tmp_path), None)
    assert (found.source, found.index.num_rows, found.notes) == ("tar", 2, [])
    assert found.index["id"].to_pylist() == ["0", "1"]


def test_labels_are_found_by_the_names_of_files_in_a_shard_in_capitals(tmp_path):
    write_tar(tmp_path / "A.TAR", ["", "", ""], "photographs")
    (tmp_path / "labels.csv").write_text("id,label\n0.png,cat\n2.png,dog\n")
    found = look(str(tmp_path / "A.TAR"), str(tmp_path / "labels.csv"))
    assert (found.source, found.labelled, found.classes) == ("tar", 2, ["cat", "dog"])


def test_a_folder_of_unlabelled_images_among_those_of_classes_is_told(photographs):
    (photographs / "Unlabelled").mkdir()
    (photographs / "Unlabelled" / "0.png").write_bytes(PICTURE)
    (note,) = look(str(photographs), None).notes
    assert note == (
        "note: the folder Unlabelled is taken for a class; if it is none, set "
        f"data.classes={json.dumps(['cat', 'dog'])}"
    )


def test_a_column_of_labels_with_another_name_is_told(tmp_path):
    table = pa.table({"image": [{"bytes": PICTURE, "path": None}] * 2, "labels": [0, 1], "size": [1, 2]})
    features = {"labels": {"_type": "ClassLabel", "names": ["a", "b"]}, "size": {"_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "train.parquet")
    (note,) = look(str(tmp_path), None).notes
    assert note == (
        "note: labels are read from a column called label, and here labels has classes: rename one to have "
        "it read"
    )


def test_images_to_predict_may_have_any_labels_and_splits(tmp_path):
    write_tar(tmp_path / "a.tar", [0, 2, 5])
    assert list_images(str(tmp_path / "a.tar"))["id"].to_pylist() == ["0", "1", "2"]
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(PICTURE)
    (tmp_path / "M.CSV").write_text("uri,label,split\n0.png,1,holdout\n1.png,3,\n")
    assert list_images(str(tmp_path / "M.CSV"))["id"].to_pylist() == ["0", "1"]
    shards = tmp_path / "shards"
    shards.mkdir()
    table = pa.table({"image": [{"bytes": PICTURE, "path": None}], "label": [7]})
    for name in ("train", "unlabeled"):
        pq.write_table(table, shards / f"{name}.parquet")
    assert list_images(str(shards)).num_rows == 2


def test_images_that_are_turned_by_their_exif_data_are_told(tmp_path):
    exif = Image.Exif()
    for number, orientation in enumerate((1, 6)):
        exif[ExifTags.Base.Orientation] = orientation
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", (20, 30)).save(tmp_path / str(number) / "a.jpg", exif=exif)
        notes = look(str(tmp_path / str(number)), None).notes
        assert [note for note in notes if "EXIF" in note] == notes
        assert bool(notes) is (orientation == 6)
