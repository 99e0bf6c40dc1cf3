"""The same ten images as a folder, tar shards, Parquet files and a manifest, local and remote."""

import os
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from dpt_ray.data import listing
from dpt_ray.data.folder import index_folder
from dpt_ray.data.index import SCHEMA, read_bytes
from dpt_ray.data.sources import INDEXERS
from dpt_ray.data.tar import index_tar
from tests.helpers.image_sources import CLASSES, IMAGES, WRITERS, write, write_folder, write_tars


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


def test_images_in_folders_beside_those_of_the_named_classes_have_no_label(tmp_path) -> None:
    for name in ("cat", "dog", "unlabelled"):
        write(f"{tmp_path}/{name}/a.png", IMAGES["image_0"][2])
    table, classes = index_folder(str(tmp_path), ["cat", "dog"])
    assert (classes, table["label"].to_pylist()) == (["cat", "dog"], [0, 1, None])
    with pytest.raises(ValueError, match="unknown class 'dog'"):  # a mistyped class is no unlabelled folder
        index_folder(str(tmp_path), ["cat", "dgo"])


def test_a_name_that_is_not_utf8_is_told_with_its_folder(tmp_path) -> None:
    write(f"{tmp_path}/cat/a.png", IMAGES["image_0"][2])
    (Path(os.fsdecode(bytes(tmp_path / "cat") + b"/caf\xe9.png"))).write_bytes(IMAGES["image_0"][2])
    with pytest.raises(ValueError, match=r"the name of 'caf\\udce9.png' in .*/cat is not UTF-8; rename it"):
        index_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "others"),
    [
        (["train/ant", "test/ant", "annotations/ant"], "annotations"),
        (["Train/ant", "labels"], "labels"),
        (["val/ant", "test/ant", "a", "b", "c", "d", "e", "f"], r"a, b, c, d, e \(6 in all\)"),
    ],
)
def test_folders_beside_those_of_splits_do_not_turn_splits_into_classes(tmp_path, folders, others) -> None:
    for folder in folders:
        write(f"{tmp_path}/{folder}/{folder.replace('/', '-')}.png", IMAGES["image_0"][2])
    with pytest.raises(ValueError, match=rf"and others: {others}; move .* data\.splits=.* data\.classes$"):
        index_folder(str(tmp_path))


def test_folders_beside_those_of_splits_may_be_splits_or_all_be_classes(tmp_path) -> None:
    for folder in ("train/ant", "test/ant", "more/ant"):
        write(f"{tmp_path}/{folder}/a.png", IMAGES["image_0"][2])
    table, classes = index_folder(str(tmp_path), split_names=listing.SPLIT_NAMES | {"more": "train"})
    assert classes == ["ant"] and Counter(table["split"].to_pylist()) == {"train": 2, "test": 1}
    named = ["more", "test", "train"]  # as a set of vehicles has a class train
    table, classes = index_folder(str(tmp_path), classes=named)
    assert classes == named and table["label"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("class_like", ["test", "valid"])
def test_one_class_that_is_called_as_a_split_is_a_class(tmp_path, class_like) -> None:
    for folder in (class_like, "ant"):
        write(f"{tmp_path}/{folder}/a.png", IMAGES["image_0"][2])
    assert index_folder(str(tmp_path))[1] == ["ant", class_like]


@pytest.mark.parametrize("extra", ["__MACOSX", ".cache"])
def test_hidden_folders_beside_those_of_splits_are_passed_over(tmp_path, extra) -> None:
    for folder in ("train/ant", "test/ant", f"{extra}/bee"):
        write(f"{tmp_path}/{folder}/a.png", IMAGES["image_0"][2])
    table, classes = index_folder(str(tmp_path))
    assert classes == ["ant"] and table["id"].to_pylist() == ["test/ant/a", "train/ant/a"]


def test_links_to_nothing_are_images_that_cannot_be_read_and_circles_are_not_followed(tmp_path) -> None:
    images = tmp_path / "images"
    write(f"{images}/ant/a.png", IMAGES["image_0"][2])
    (images / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / "ant" / "self.png").symlink_to(images / "ant" / "self.png")
    (images / "ant" / "up").symlink_to(images)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(images)
    (images / "bee").symlink_to(tmp_path / "elsewhere")
    table, classes = index_folder(str(images))
    assert classes == ["ant", "bee"]
    assert table["id"].to_pylist() == ["ant/a", "ant/gone", "ant/self"]
    assert read_bytes(table) == [IMAGES["image_0"][2], b"", b""]


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
