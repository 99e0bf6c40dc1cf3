"""The same ten images as a folder, tar shards, Parquet files and a manifest, local and remote."""

import csv
import io
import json
import shutil
import subprocess
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dpt_ray.data import listing
from dpt_ray.data.decode import decode
from dpt_ray.data.digits import write_digits
from dpt_ray.data.folder import index_folder
from dpt_ray.data.index import SCHEMA, read_bytes
from dpt_ray.data.manifest import index_manifest
from dpt_ray.data.parquet import index_parquet
from dpt_ray.data.sources import INDEXERS
from dpt_ray.data.tar import index_tar

CLASSES = ["bee", "ant"]  # not in sorted order, so that class ids must come from somewhere


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


# name -> (split, class name, bytes)
IMAGES = {
    f"image_{k}": (
        "train" if k < 7 else "validation",
        ["ant", "bee"][k % 2],
        png(np.random.default_rng(k).integers(0, 256, (5, 4, 3), np.uint8)),
    )
    for k in range(10)
}


def write(uri: str, data: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(uri)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, data)


def write_folder(root: str) -> str:
    for name, (split, label, data) in IMAGES.items():
        write(f"{root}/{split.replace('validation', 'val')}/{label}/{name}.PNG", data)
    write(f"{root}/train/ant/notes.txt", b"no image")
    write(f"{root}/train/ant/.hidden.png", b"no image")
    return root


def tar_of(members: dict[str, bytes], mode: str = "w", **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tars(root: str) -> str:
    for shard in ("train-0000", "train-0001", "val-0000"):
        members = {}
        for k, (name, (split, label, data)) in enumerate(IMAGES.items()):
            if shard.startswith(split[:3]) and (split != "train" or k // 4 == int(shard[-1])):
                key = f"{'long-folder-name-' * 8}/{name}" if k == 3 else name
                members[f"{key}.png"] = data
                as_json = json.dumps({"label": label, "width": 4}).encode()
                members |= {f"{key}.json": as_json} if k % 2 else {f"{key}.cls": label.encode()}
        write(f"{root}/{shard}.tar", tar_of(members))
    return root


def write_parquets(root: str) -> str:
    feature = {"names": CLASSES, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    for split in ("train", "validation"):
        chosen = [(n, label, data) for n, (s, label, data) in IMAGES.items() if s == split]
        images = [{"bytes": data, "path": f"{n}.png"} for n, _, data in chosen]
        labels = [CLASSES.index(label) for _, label, _ in chosen]
        table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=3)
        write(f"{root}/data/{split}-00000-of-00001.parquet", buffer.getvalue())
    return root


def write_manifest(root: str, rows: list[dict] | None = None) -> str:
    if rows is None:
        write_folder(f"{root}/files")
        rows = [
            {
                "uri": f"files/{s.replace('validation', 'val')}/{label}/{n}.PNG",
                "label": label,
                "split": s,
            }
            for n, (s, label, _) in IMAGES.items()
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    write(f"{root}/images.csv", text.getvalue().encode())
    return f"{root}/images.csv"


WRITERS = {
    "folder": write_folder,
    "tar": write_tars,
    "parquet": write_parquets,
    "manifest": write_manifest,
}


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path)
    else:
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_source_gives_the_same_images(kind, root) -> None:
    table, classes = INDEXERS[kind](WRITERS[kind](root), classes=CLASSES)
    assert classes == CLASSES
    assert table.schema.equals(SCHEMA)
    expected = Counter((s, CLASSES.index(label), data) for s, label, data in IMAGES.values())
    found = zip(table["split"].to_pylist(), table["label"].to_pylist(), read_bytes(table), strict=True)
    assert Counter(found) == expected


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_are_read_in_any_order_and_number(kind, tmp_path) -> None:
    table, _ = INDEXERS[kind](WRITERS[kind](str(tmp_path)))
    everything = read_bytes(table)
    order = [9, 0, 4, 4, 2, 7]
    assert read_bytes(table.take(order)) == [everything[i] for i in order]
    assert read_bytes(table.slice(0, 0)) == []


def test_class_names_are_sorted_folder_names_and_ids_are_paths(tmp_path) -> None:
    table, classes = index_folder(write_folder(str(tmp_path)))
    assert classes == ["ant", "bee"]
    assert {row["id"]: row["label"] for row in table.to_pylist()} == {
        f"{split.replace('validation', 'val')}/{label}/{name}": ["ant", "bee"].index(label)
        for name, (split, label, _) in IMAGES.items()
    }


def test_split_names_can_be_mapped(tmp_path) -> None:
    names = {"train": "train", "val": "test"}  # as ImageNet's are
    for table, _ in (
        index_folder(write_folder(str(tmp_path / "folder")), split_names=names),
        index_tar(write_tars(str(tmp_path / "tar")), split_names=names),
    ):
        assert Counter(table["split"].to_pylist()) == {"train": 7, "test": 3}


def test_a_flat_folder_is_unlabelled_and_class_folders_may_be_nested_or_links(tmp_path) -> None:
    data = IMAGES["image_0"][2]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.webp").write_bytes(data)
    write(f"{tmp_path}/images/loose.png", data)
    write(f"{tmp_path}/images/3/deep/er/a.jpeg", data)
    write(f"{tmp_path}/images/12/b.jpg", data)
    (tmp_path / "images" / "link").symlink_to(tmp_path / "elsewhere")
    table, classes = index_folder(f"{tmp_path}/images")
    assert classes == ["12", "3", "link"]
    assert dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)) == {
        "12/b": 0,
        "3/deep/er/a": 1,
        "link/c": 2,
        "loose": None,
    }


def test_two_files_of_one_name_are_refused(tmp_path) -> None:
    write(f"{tmp_path}/ant/a.png", b"1")
    write(f"{tmp_path}/ant/a.jpg", b"2")
    with pytest.raises(ValueError, match="ant/a"):
        index_folder(str(tmp_path))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_source_that_is_not_there_is_refused(kind, tmp_path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        INDEXERS[kind](f"{tmp_path}/nowhere.csv")


def test_a_folder_without_images_is_refused(tmp_path) -> None:
    (tmp_path / "ant").mkdir()
    with pytest.raises(ValueError, match="no images"):
        index_folder(str(tmp_path))
    with pytest.raises(ValueError, match=r"no \.tar files"):
        index_tar(str(tmp_path))


def test_indexing_a_tar_does_not_read_the_images(tmp_path, monkeypatch) -> None:
    image = bytes(1_000_000)
    path = tmp_path / "big.tar"
    path.write_bytes(tar_of({f"{k}.{e}": d for k in "ab" for e, d in {"png": image, "cls": b"1"}.items()}))
    fs = fsspec.filesystem("file")
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(type(fs), "open", lambda self, p, mode: Counting(p))
    table, _ = index_tar(str(path))
    assert table["length"].to_pylist() == [1_000_000] * 2
    assert 4 * 512 <= sum(read) < 20_000


def test_tar_labels_as_numbers_name_themselves(tmp_path) -> None:
    write(
        f"{tmp_path}/a.tar",
        tar_of({"x.jpg": b"1", "x.cls": b"2\n", "x.json": b"{}", "y.jpg": b"2", "z.PNG": b"3"}),
    )
    table, classes = index_tar(f"{tmp_path}/a.tar")
    assert classes == ["0", "1", "2"]
    assert table["id"].to_pylist() == ["x", "y", "z"]
    assert table["label"].to_pylist() == [2, None, None]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_files_of_a_sample_and_hidden_ones_are_passed_over(tmp_path, format) -> None:
    members = {
        "._a.jpg": b"x",
        "a.jpg": b"1",
        "._a.cls": b"x",
        "a.cls": b"5",
        "a.mask.png": b"2",
        ".b.png": b"3",
    }
    write(f"{tmp_path}/a.tar", tar_of(members, format=format))
    table, _ = index_tar(f"{tmp_path}/a.tar", list("012345"))
    assert (table["id"].to_pylist(), table["label"].to_pylist()) == (["a"], [5])


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_the_end_that_gnu_tar_writes_is_known(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(bytes(512))
    subprocess.run(["tar", "-cf", "s.tar", "-b", "1", "a.png"], cwd=tmp_path, check=True)
    assert index_tar(f"{tmp_path}/s.tar")[0]["id"].to_pylist() == ["a"]
    subprocess.run("cat s.tar s.tar > twice.tar", shell=True, cwd=tmp_path, check=True)
    assert index_tar(f"{tmp_path}/twice.tar")[0]["id"].to_pylist() == ["a"]


GOOD_TAR = tar_of({"a.png": bytes(3000)})
MANY = tar_of({f"{k}.png": bytes([k]) * 3000 for k in range(1, 9)})
HEADER = 5 * (512 + 3072)  # of the sixth member


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar_of({"a.png": b"1"}, "w:gz"), "without gzip"),
        (GOOD_TAR[:2000], "no complete uncompressed tar"),
        (b"no tar" * 500, "no complete uncompressed tar"),
        (MANY[:HEADER] + b"x" + MANY[HEADER + 1 :], f"end mark at byte {HEADER}"),
        (MANY[:HEADER] + bytes(512) + MANY[HEADER + 512 :], f"end mark at byte {HEADER}"),
        (MANY[: HEADER + 300], f"end mark at byte {HEADER}"),
        (MANY[:HEADER], f"end mark at byte {HEADER}"),
        (tar_of({"a.png": b"1", "a.jpg": b"2"}), "two images"),
        (tar_of({"a.jpg": b"1", "photo.v2.png": b"2"}), r"photo\.v2\.png .* key 'photo'.* one dot"),
        (tar_of({"x/IMG_1.02.03.jpg": b"1"}), r"IMG_1\.02\.03\.jpg .* key 'x/IMG_1'"),
        (tar_of({"a.png": b"1", "a.json": b"{"}), r"a\.json is not JSON"),
    ],
)
def test_a_broken_tar_is_refused(tmp_path, data, message) -> None:
    write(f"{tmp_path}/shard.tar", data)
    with pytest.raises(ValueError, match=message):
        index_tar(str(tmp_path))


def test_parquet_takes_class_names_from_its_metadata_and_negative_labels_as_unknown(
    tmp_path,
) -> None:
    assert index_parquet(write_parquets(f"{tmp_path}/a"))[1] == CLASSES
    table = pa.table({"img": [{"bytes": b"1", "path": None}, {"bytes": None, "path": None}]})
    pq.write_table(table.append_column("label", pa.array([-1, 1])), tmp_path / "test.parquet")
    index, classes = index_parquet(f"{tmp_path}/test.parquet")
    assert classes == ["0", "1"]
    assert index["id"].to_pylist() == ["test-000000", "test-000001"]
    assert index["label"].to_pylist() == [None, 1]
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


def test_a_parquet_manifest_may_have_ids_ranges_and_labels_with_gaps(tmp_path) -> None:
    write(f"{tmp_path}/blob.bin", b"0123456789")
    table = pa.table(
        {
            "id": ["a", "b"],
            "uri": ["blob.bin", f"file://{tmp_path}/blob.bin"],
            "offset": [2, 5],
            "length": [3, -1],
            "label": pa.array([1.0, None]),
            "other": [None, None],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    index, classes = index_manifest(f"{tmp_path}/m.parquet")
    assert read_bytes(index) == [b"234", b"56789"]
    assert (index["label"].to_pylist(), classes) == ([1, None], ["0", "1"])
    assert index["split"].to_pylist() == ["train", "train"]


def test_a_manifest_with_ids_alone_takes_them_as_paths(tmp_path) -> None:
    write(f"{tmp_path}/sub/x.png", b"xx")
    write(f"{tmp_path}/y.png", b"yyy")
    index, _ = index_manifest(write_manifest(str(tmp_path), [{"id": "sub/x.png"}, {"id": "y.png"}]))
    assert index["id"].to_pylist() == ["sub/x.png", "y.png"]
    assert index["length"].to_pylist() == [2, 3]
    assert read_bytes(index) == [b"xx", b"yyy"]


def test_a_manifest_without_rows_is_refused(tmp_path) -> None:
    write(f"{tmp_path}/m.csv", b"uri,label\n")
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "m.parquet")
    for name in ("m.csv", "m.parquet"):
        with pytest.raises(ValueError, match=f"manifest {tmp_path}/{name} lists no images"):
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


def test_a_missing_file_is_an_error_that_names_it(tmp_path) -> None:
    table, _ = index_folder(write_folder(str(tmp_path)))
    path = Path(table["uri"][0].as_py().removeprefix("file://"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        read_bytes(table)


class RangeServer(BaseHTTPRequestHandler):
    """Serves BODY with byte ranges, as object stores do; /secret is forbidden, others missing."""

    BODY = bytes(range(256))

    def do_GET(self) -> None:
        if self.path != "/shard.tar":
            self.send_error(403 if self.path == "/secret" else 404)
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        body = self.BODY[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def test_remote_ranges_are_read_concurrently_by_an_asynchronous_file_system() -> None:
    server = HTTPServer(("127.0.0.1", 0), RangeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"

    def rows(name: str, ranges: list[tuple[int, int]]) -> pa.Table:
        return pa.table(
            {
                "uri": [f"{base}/{name}"] * len(ranges),
                "offset": [offset for offset, _ in ranges],
                "length": [length for _, length in ranges],
            }
        )

    try:
        assert fsspec.core.url_to_fs(base)[0].async_impl
        data = read_bytes(rows("shard.tar", [(10, 5), (0, -1), (3, 0), (200, 56)]))
        body = RangeServer.BODY
        assert data == [body[10:15], body, b"", body[200:]]
        with pytest.raises(FileNotFoundError, match="gone"):
            read_bytes(rows("gone", [(0, 5)]))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_an_object_that_is_gone_is_named(s3_bucket, kind) -> None:
    root, fs = s3_bucket
    table, _ = INDEXERS[kind](WRITERS[kind](root))
    uri = table["uri"][-1].as_py()
    fs.rm_file(uri)
    with pytest.raises(FileNotFoundError, match=f"^{uri} does not exist any more"):
        read_bytes(table)


def test_an_object_that_the_store_does_not_give_is_named(s3_bucket, monkeypatch) -> None:
    root, fs = s3_bucket
    table, _ = index_folder(write_folder(root))

    async def break_off(*_args, **_kwargs):
        raise OSError(5, "Reduce your\nrequest rate")

    monkeypatch.setattr(type(fs), "_cat_file", break_off)
    with pytest.raises(OSError, match=f"^{table['uri'][0]} cannot be read .*Reduce your request rate"):
        read_bytes(table)


def test_denied_access_names_the_file(tmp_path, monkeypatch) -> None:
    table, _ = index_folder(write_folder(str(tmp_path)))

    def deny(*_args, **_kwargs):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "open", deny)
    with pytest.raises(PermissionError, match=r"access denied to file:.*image_\d.PNG"):
        read_bytes(table)


def test_the_digits_are_those_of_scikit_learn_with_fixed_stratified_splits(root) -> None:
    table, classes = write_digits(root)
    digits = load_digits()
    assert classes == list("0123456789")
    assert table["id"].to_pylist() == [f"digit-{i:04d}" for i in range(1797)]
    assert table["label"].to_pylist() == digits.target.tolist()
    splits = table["split"].to_pylist()
    assert Counter(splits) == {"train": 997, "validation": 200, "test": 600}
    cells = Counter(zip(splits, digits.target.tolist(), strict=True))
    assert all(18 <= cells["validation", k] <= 22 for k in range(10))
    images = np.stack([np.asarray(decode(data, "L")) for data in read_bytes(table)])
    assert np.array_equal(np.rint(images / 255 * 16), digits.images)
    assert images.max() == 255
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}


def test_the_digits_are_written_the_same_every_time(tmp_path) -> None:
    first, second = (write_digits(f"{tmp_path}/{k}")[0] for k in (0, 1))
    assert first.drop(["uri"]).equals(second.drop(["uri"]))
    assert (tmp_path / "0/digits.tar").read_bytes() == (tmp_path / "1/digits.tar").read_bytes()
    assert index_tar(f"{tmp_path}/0")[0]["label"].equals(first["label"])


def test_listings_of_every_file_system_agree(tmp_path) -> None:
    for root in (str(tmp_path), f"memory://{tmp_path.name}"):
        write(f"{root}/b/x.png", b"123")
        write(f"{root}/a.png", b"1")
        write(f"{root}/.hidden", b"1")
    local = listing.list_directory(*listing.open_root(str(tmp_path)))
    memory = listing.list_directory(*listing.open_root(f"memory://{tmp_path.name}/"))
    assert (
        [(n, d) for n, d, *_ in local]
        == [(n, d) for n, d, *_ in memory]
        == [
            ("a.png", False),
            ("b", True),
        ]
    )
