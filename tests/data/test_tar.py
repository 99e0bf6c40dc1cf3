"""Images in tar shards: what is passed over, what labels they carry, and which tars are refused."""

import io
import shutil
import subprocess
import tarfile

import fsspec
import pytest

from dpt_ray.data.tar import index_tar
from tests.helpers.image_sources import write
from tests.helpers.images import tar_of


def test_indexing_a_tar_does_not_read_the_images(tmp_path, monkeypatch) -> None:
    image = bytes(1_000_000)
    path = tmp_path / "big.tar"
    path.write_bytes(tar_of({f"{k}.{e}": d for k in "ab" for e, d in {"png": image, "cls": b"0"}.items()}))
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
        tar_of(
            {"x.jpg": b"1", "x.cls": b"1\n", "x.json": b"{}", "y.jpg": b"2", "z.PNG": b"3", "z.cls": b"0"}
        ),
    )
    table, classes = index_tar(f"{tmp_path}/a.tar")
    assert classes == ["0", "1"]
    assert table["id"].to_pylist() == ["x", "y", "z"]
    assert table["label"].to_pylist() == [1, None, 0]


@pytest.mark.parametrize("order", [["a.jpg", "b.jpg", "a.cls"], ["a.cls", "b.jpg", "b.cls", "a.jpg"]])
def test_a_label_that_is_not_beside_its_image_is_refused_and_one_without_an_image_is_not(tmp_path, order):
    write(f"{tmp_path}/a.tar", tar_of(dict.fromkeys([*order, "info.json"], b"0")))
    with pytest.raises(ValueError, match=r"the label of a is not beside its image.* --sort=name"):
        index_tar(f"{tmp_path}/a.tar")
    write(f"{tmp_path}/a.tar", tar_of(dict.fromkeys(sorted([*order, "lost.cls", "info.json"]), b"0")))
    assert index_tar(f"{tmp_path}/a.tar")[0]["id"].to_pylist() == ["a", "b"]


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
        pytest.param(tar_of({"a.png": b"1"}, "w:gz"), "without gzip", id="gzip"),  # its header has the time
        (GOOD_TAR[:2000], "not a complete uncompressed tar"),
        (b"no tar" * 500, "not a complete uncompressed tar"),
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


def member(name, payload=b"", type=tarfile.REGTYPE, link="", **pax):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname, info.pax_headers = len(payload), type, link, pax
    return info, payload


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**13)}


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("../../home/a.png", b"1"), "leads out of the tar"),
        (member("/etc/a.png", b"1"), "leads out of the tar"),
        (member("a.png", type=tarfile.SYMTYPE, link="/etc/passwd"), "is a link; .* --dereference"),
        (member("a.cls", type=tarfile.LNKTYPE, link="../b.cls"), "is a link"),
        (member("a.cls", b"1\n0\n1\n".ljust(512, b"\0") + b"7", **SPARSE), "is sparse"),
        (member("a.cls", bytes((1 << 20) + 1)), "a label of 1048577 bytes, and 1048576 are allowed"),
    ],
)
def test_a_tar_that_leads_elsewhere_or_swells_is_refused(tmp_path, hostile, message) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for info, payload in (member("good.png", b"1"), hostile):
            tar.addfile(info, io.BytesIO(payload))
    with pytest.raises(ValueError, match=rf"s\.tar: .*{message}"):
        index_tar(f"{tmp_path}/s.tar")


def test_a_link_that_is_no_image_and_a_label_of_a_mebibyte_are_no_reason_to_refuse(tmp_path) -> None:
    passed = [
        member("README", type=tarfile.SYMTYPE, link="good.png"),
        member("good.png", b"1"),
        member("good.cls", b"oak".ljust(1 << 20)),
    ]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for info, payload in passed:
            tar.addfile(info, io.BytesIO(payload))
    table, classes = index_tar(f"{tmp_path}/s.tar")
    assert (table["id"].to_pylist(), classes) == (["good"], ["oak"])
