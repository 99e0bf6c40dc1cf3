"""Artifacts are published whole or not at all, on a local disk and on any fsspec file system."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import fsspec
import pytest

from dpt_ray.store.artifact import Artifact, Store, identity, local_copy, sha256


@pytest.fixture(params=["local", "memory"])
def uri(request, tmp_path, node):
    """An empty place to write to: a folder, or an object store that lives in memory."""
    if request.param == "local":
        return str(tmp_path / "out")
    return f"memory://{uuid.uuid4().hex}"


def writer(data):
    return lambda path: path.write_bytes(data)


def files(artifact):
    """Every file of an artifact, the hidden ones too, relative to it."""
    root = artifact.path("")
    return sorted(name[len(root) :] for name in artifact.fs.find(root))


# Identity ------------------------------------------------------------------------------------------


def test_an_identity_depends_on_each_of_its_parts_and_on_no_order():
    parts = {"stage": "s", "version": 1, "settings": {"a": 1, "b": [2, None]}, "inputs": {"x": "1", "y": "2"}}
    base = identity(**parts)
    assert base == identity("s", 1, {"b": [2, None], "a": 1}, {"y": "2", "x": "1"})
    others = [
        {"stage": "t"},
        {"version": 2},
        {"settings": {"a": 1.5, "b": [2, None]}},
        {"inputs": {"x": "1", "y": "3"}},
        {"inputs": {"z": "1", "y": "2"}},
    ]
    assert len({base, *(identity(**(parts | other)) for other in others)}) == 1 + len(others)
    assert len(base) == 16 and set(base) <= set("0123456789abcdef")


def test_an_identity_is_the_sha256_of_canonical_json():
    text = '{"inputs":{"i":"0"},"settings":{"a":0.5,"b":null},"stage":"s","version":3}'
    assert (
        identity("s", 3, {"b": None, "a": 0.5}, {"i": "0"}) == hashlib.sha256(text.encode()).hexdigest()[:16]
    )


def test_a_setting_that_is_not_a_number_has_no_identity():
    with pytest.raises(ValueError):
        identity("s", 1, {"a": float("nan")}, {})


# Publishing ----------------------------------------------------------------------------------------


def test_what_is_published_can_be_read_back(uri):
    artifact = Store(uri).artifact("stage", "abc")
    assert not artifact.published and artifact.shards() == {}
    artifact.write_json("folder/facts.json", {"n": 1})
    with artifact.writing("data.bin") as path:
        path.write_bytes(b"123")
    assert not artifact.published
    artifact.publish({"rows": 3})
    assert artifact.published
    assert artifact.manifest == {"rows": 3}
    assert artifact.read_json("folder/facts.json") == {"n": 1}
    assert artifact.read_bytes("data.bin") == artifact.local_file("data.bin").read_bytes() == b"123"
    assert files(artifact) == ["data.bin", "folder/facts.json", "manifest.json"]


def test_a_writer_that_raises_leaves_nothing_at_all(uri, tmp_path):
    artifact = Store(uri).artifact("stage", "abc")
    with pytest.raises(RuntimeError, match="half way"), artifact.writing("data.bin") as path:
        path.write_bytes(b"half")
        raise RuntimeError("half way")

    def fails(path):
        path.write_bytes(b"half")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        artifact.publish_shard("0", ".bin", 1, fails)
    with pytest.raises(RuntimeError, match="half way"):
        artifact.publish_files(lambda folder: fails(folder / "model.bin"))
    assert artifact.shards() == {}
    assert files(artifact) == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_rewritten_file_is_seen_whole_before_and_after(uri):
    artifact = Artifact(uri)
    artifact.write_bytes("state", b"old")
    with artifact.writing("state") as path:
        path.write_bytes(b"new")
        assert artifact.read_bytes("state") == b"old"
    assert artifact.read_bytes("state") == b"new"


def test_a_folder_is_published_below_its_prefix(uri):
    artifact = Artifact(uri)

    def write(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "b.txt").write_text("b")
        (folder / "a.txt").write_text("a")

    artifact.publish_files(write, "model/")
    assert files(artifact) == ["model/a.txt", "model/deep/b.txt"]
    assert artifact.read_bytes("model/deep/b.txt") == b"b"


# Shards --------------------------------------------------------------------------------------------


def test_a_shard_has_a_manifest_that_describes_its_payload(uri):
    artifact = Store(uri).artifact("stage", "abc")
    entry = artifact.publish_shard("s-1", ".bin", 7, writer(b"payload"), first=3)
    assert artifact.shards() == {"s-1": entry}
    assert artifact.read_bytes(entry["file"]) == b"payload"
    assert (entry["shard"], entry["rows"], entry["first"]) == ("s-1", 7, 3)
    assert (entry["bytes"], entry["sha256"]) == (7, hashlib.sha256(b"payload").hexdigest())


def test_shards_are_found_below_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    artifact = Artifact(f"{tmp_path}/run [2]?*")
    for name in "ab":
        artifact.publish_shard(name, ".bin", 1, writer(b"payload"))
    assert sorted(artifact.shards()) == ["a", "b"]


def test_the_first_complete_shard_stays(uri):
    artifact = Store(uri).artifact("stage", "abc")
    first = artifact.publish_shard("0", ".bin", 1, writer(b"first"))

    def never(path):
        raise AssertionError("a published shard is not written again")

    assert artifact.publish_shard("0", ".bin", 1, never) == first
    assert artifact.read_bytes(artifact.shards()["0"]["file"]) == b"first"


def test_an_attempt_that_is_overtaken_gives_way_and_leaves_nothing(uri):
    slow, quick = Store(uri).artifact("stage", "abc"), Store(uri).artifact("stage", "abc")
    published = []

    def overtaken(path):
        path.write_bytes(b"slow")
        published.append(quick.publish_shard("0", ".bin", 1, writer(b"quick")))

    assert slow.publish_shard("0", ".bin", 1, overtaken) == published[0]
    assert slow.read_bytes(slow.shards()["0"]["file"]) == b"quick"
    assert files(slow) == sorted(["shards/0.json", published[0]["file"]])


def test_files_of_torn_attempts_are_not_seen(uri):
    artifact = Store(uri).artifact("stage", "abc")
    whole = artifact.publish_shard("0", ".bin", 1, writer(b"0"))
    artifact.write_bytes("shards/1.deadbeef.bin", b"a payload without a manifest")
    artifact.write_bytes("shards/.1.json.deadbeef.tmp", b'{"shard": "1", "fi')
    assert artifact.shards() == {"0": whole}
    assert not artifact.published


def test_extents_of_an_artifact_share_its_shards(uri):
    store = Store(uri)
    small, large = store.artifact("samples", "abc", "k1"), store.artifact("samples", "abc", "k2")
    entries = [small.publish_shard("0", ".bin", 1, writer(b"0"))]
    small.publish({"shards": entries})
    assert small.published and not large.published
    assert large.shards() == small.shards()
    entries.append(large.publish_shard("1", ".bin", 1, writer(b"1")))
    large.publish({"shards": entries})
    assert [shard["shard"] for shard in small.listed_shards()] == ["0"]
    assert [shard["shard"] for shard in large.listed_shards()] == ["0", "1"]
    assert small.listed_shards()[0]["file"] == large.listed_shards()[0]["file"]
    assert len([name for name in files(large) if name.endswith(".bin")]) == 2


@pytest.mark.parametrize("moment", ["in the payload", "before the manifest", "in the manifest"])
def test_a_process_killed_while_it_publishes_leaves_no_shard_to_trust(tmp_path, moment):
    child = f"""
        import os, signal
        from dpt_ray.store import artifact as artifacts

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        def write(path):
            path.write_bytes(b"half of it")
            if {moment!r} == "in the payload":
                die()

        def torn(self, name, value):
            with self.writing(name) as path:
                path.write_text('{{"shard": "0", "fi')
                die()

        if {moment!r} == "before the manifest":
            artifacts.Artifact.write_json = die
        if {moment!r} == "in the manifest":
            artifacts.Artifact.write_json = torn
        artifact = artifacts.Store({str(tmp_path)!r}).artifact("stage", "abc")
        artifact.publish_shard("0", ".bin", 1, write)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(child)])
    assert result.returncode == -signal.SIGKILL
    artifact = Store(str(tmp_path)).artifact("stage", "abc")
    assert [name for name in files(artifact) if "/0." in name or "/.0." in name], "the child wrote nothing"
    assert artifact.shards() == {}
    entry = artifact.publish_shard("0", ".bin", 1, writer(b"whole"))
    assert artifact.read_bytes(artifact.shards()["0"]["file"]) == b"whole"
    assert entry["bytes"] == 5


# Copies of remote files ----------------------------------------------------------------------------


@pytest.fixture
def remote(node):
    return f"memory://{uuid.uuid4().hex}"


def test_a_remote_file_is_copied_once_and_anew_when_it_was_rewritten(remote):
    artifact = Artifact(remote)
    artifact.write_bytes("facts.json", b"one")
    copy = artifact.local_file("facts.json")
    written = copy.stat().st_ino
    assert copy.name == "facts.json" and copy.read_bytes() == b"one"
    assert artifact.local_file("facts.json") == copy and copy.stat().st_ino == written
    artifact.write_bytes("facts.json", b"two")  # as many bytes as before
    assert artifact.local_file("facts.json").read_bytes() == b"two"
    assert sha256(f"{remote}/facts.json") == hashlib.sha256(b"two").hexdigest()


def test_a_download_that_breaks_off_leaves_no_copy(remote, monkeypatch):
    artifact = Artifact(remote)
    artifact.write_bytes("weights.bin", b"1234")

    def breaks(self, source, target, **options):
        Path(target).write_bytes(b"12")
        raise ConnectionError("gone")

    with monkeypatch.context() as broken:
        broken.setattr(type(artifact.fs), "get_file", breaks)
        with pytest.raises(ConnectionError):
            artifact.local_file("weights.bin")
    assert artifact.local_file("weights.bin").read_bytes() == b"1234"


def test_a_local_file_is_used_where_it_lies(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"1")
    assert local_copy(tmp_path / "w.bin") == tmp_path / "w.bin"
    assert local_copy(f"file://{tmp_path}/w.bin") == tmp_path / "w.bin"


@pytest.mark.parametrize("name", ["none.bin", ""])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(ValueError, match="no such file"):
        local_copy(tmp_path / name)


# The store -----------------------------------------------------------------------------------------


def test_the_store_lists_what_it_holds_with_sizes(uri):
    store = Store(uri)
    assert list(store.all_artifacts()) == [] and store.digests("a") == []
    store.artifact("b", "2").write_bytes("x/y.bin", b"12345")
    store.artifact("a", "1").write_bytes("z.bin", b"1")
    store.artifact("a", "1").publish({})  # two bytes
    store.artifact("a", "0").write_bytes("z.bin", b"")
    store.run_folder("name").write_bytes("config.yaml", b"123")
    assert list(store.all_artifacts()) == [("a", "0", 0), ("a", "1", 3), ("b", "2", 5)]
    assert store.digests("a") == ["0", "1"]


def test_an_artifact_is_removed_with_its_manifests_first(uri, monkeypatch):
    store = Store(uri)
    artifact = store.artifact("samples", "abc", "k2")
    artifact.publish_shard("0", ".bin", 1, writer(b"0"))
    artifact.publish({"shards": []})
    store.artifact("samples", "abc", "k1").publish({"shards": []})
    store.artifact("samples", "other").publish({})
    with monkeypatch.context() as broken:

        def breaks(self, path, **options):
            raise ConnectionError("gone")

        broken.setattr(type(artifact.fs), "rm", breaks)
        with pytest.raises(ConnectionError):
            store.remove("samples", "abc")
    assert not artifact.published and not store.artifact("samples", "abc", "k1").published
    assert artifact.shards()
    store.remove("samples", "abc")
    assert store.digests("samples") == ["other"]
    assert store.artifact("samples", "other").published


def test_names_that_look_like_patterns_are_only_names(tmp_path):
    store = Store(str(tmp_path / "run[1]*"))
    store.artifact("a", "1").publish({})
    store.check_writable()
    assert list(store.all_artifacts()) == [("a", "1", 2)]
    store.remove("a", "1")
    assert list(store.all_artifacts()) == []


def test_checking_that_a_store_can_be_written_leaves_nothing(uri):
    store = Store(uri)
    store.check_writable()
    assert fsspec.core.url_to_fs(uri)[0].find(uri) == []


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_store_that_cannot_be_written_is_named_with_the_reason(tmp_path, scheme):
    (tmp_path / "file").touch()
    output = f"{scheme}{tmp_path}/file/out"
    with pytest.raises(ValueError, match="Not a directory") as caught:
        Store(output).check_writable()
    assert repr(output) in str(caught.value) and "choose another folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_of_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"output: 'nosuch://bucket' cannot be written \(Protocol not known"):
        Store("nosuch://bucket").check_writable()


def test_what_is_published_has_reached_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append("rename"), real_replace(a, b))[1])
    Artifact(str(tmp_path)).publish({"rows": 1})
    assert calls == ["fsync", "rename"]
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"rows": 1}
