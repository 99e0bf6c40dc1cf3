"""Manifests of images: which columns they may have, and how a faulty one is told."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.data.index import read_bytes
from dpt_ray.data.lookup import find_images
from dpt_ray.data.manifest import index_manifest
from tests.helpers.image_sources import write, write_manifest


def test_a_parquet_manifest_may_have_ids_ranges_and_labels_with_gaps(tmp_path) -> None:
    write(f"{tmp_path}/blob.bin", b"0123456789")
    table = pa.table(
        {
            "id": ["a", "b"],
            "uri": ["blob.bin", f"file://{tmp_path}/blob.bin"],
            "offset": [2, 5],
            "length": [3, -1],
            "label": pa.array([0.0, None]),
            "other": [None, None],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    index, classes = index_manifest(f"{tmp_path}/m.parquet")
    assert read_bytes(index) == [b"234", b"56789"]
    assert (index["label"].to_pylist(), classes) == ([0, None], ["0"])
    assert index["split"].to_pylist() == ["train", "train"]


def test_a_manifest_with_ids_alone_takes_them_as_paths(tmp_path) -> None:
    write(f"{tmp_path}/sub/x.png", b"xx")
    write(f"{tmp_path}/y.png", b"yyy")
    index, _ = index_manifest(write_manifest(str(tmp_path), [{"id": "sub/x.png"}, {"id": "y.png"}]))
    assert index["id"].to_pylist() == ["sub/x.png", "y.png"]
    assert index["length"].to_pylist() == [2, 3]
    assert read_bytes(index) == [b"xx", b"yyy"]


def test_labels_that_are_not_a_number_are_unknown(tmp_path) -> None:
    rows = pa.table({"uri": ["a.png", "b.png", "c.png"], "length": [1, 1, 1], "label": [0.0, math.nan, 1.0]})
    pq.write_table(rows, tmp_path / "m.parquet")
    index, classes = index_manifest(f"{tmp_path}/m.parquet")
    assert (classes, index["label"].to_pylist()) == (["0", "1"], [0, None, 1])


def test_images_are_found_by_the_names_that_a_manifest_has(tmp_path) -> None:
    pq.write_table(pa.table({"uri": ["./sub/a.png", "b.png"], "length": [1, 1]}), tmp_path / "m.parquet")
    index, _ = index_manifest(f"{tmp_path}/m.parquet")
    keys = ["./sub/a.png", "sub/a.png", "./b.png", "b"]
    assert [len(find_images(index, [key]).get(key, ())) for key in keys] == [1, 1, 1, 1]


def test_a_manifest_without_rows_is_refused(tmp_path) -> None:
    write(f"{tmp_path}/m.csv", b"uri,label\n")
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "m.parquet")
    for name in ("m.csv", "m.parquet"):
        with pytest.raises(ValueError, match=f"manifest {tmp_path}/{name} lists no images"):
            index_manifest(f"{tmp_path}/{name}")


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_a_column_that_is_nearly_one_of_a_manifests_is_refused(tmp_path, name) -> None:
    write(f"{tmp_path}/x.png", b"xx")
    write(f"{tmp_path}/m.csv", b"uri,label, Split,camera\nx.png,cat,test,1\n")
    pq.write_table(pa.table({"uri": ["x.png"], " Split": ["test"], "camera": ["1"]}), tmp_path / "m.parquet")
    with pytest.raises(
        ValueError, match=rf"manifest {tmp_path}/{name} has a column ' Split'; write it 'split'"
    ):
        index_manifest(f"{tmp_path}/{name}")


def test_rows_of_a_manifest_without_uri_are_told(tmp_path) -> None:
    write(f"{tmp_path}/a.png", b"1")
    write(f"{tmp_path}/m.csv", b"uri,label\na.png,x\n,y\n,z\n")
    write(f"{tmp_path}/i.csv", b"id,label\n,x\n")
    uris = ["a.png", "a.png", "a.png", None]
    pq.write_table(pa.table({"uri": uris, "id": ["a", "b", "c", "d"]}), tmp_path / "m.parquet")
    for name, problem in {
        "m.csv": r"2 row\(s\) without uri, the first is row 2;",
        "m.parquet": r"1 row\(s\) without uri, the first is row 4;",
        "i.csv": r"1 row\(s\) without id, the first is row 1;",
    }.items():
        with pytest.raises(ValueError, match=f"manifest {tmp_path}/{name} has {problem}"):
            index_manifest(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"uri": "gone.png"}], "files that do not exist: .*gone.png"),
        ([{"uri": "no/where.png"}], "files that do not exist: .*where.png"),
        ([{"path": "x.png"}], "needs uri or id"),
        ([{"uri": "images.csv", "split": "dev"}], "split 'dev'"),
    ],
)
def test_a_faulty_manifest_is_refused(tmp_path, rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        index_manifest(write_manifest(str(tmp_path), rows))
