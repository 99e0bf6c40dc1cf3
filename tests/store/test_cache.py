"""Copies on a node: processes share them, nobody sees half of one, and a full disk is told."""

import errno
import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from dpt_ray.store import cache
from dpt_ray.store.cache import RemoteFile

# A process that opens a file of a slow store which writes down each download.
OPENS = """
import sys, time
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from dpt_ray.store.cache import RemoteFile

class Slow(LocalFileSystem):
    def get_file(self, source, target, **more):
        with open(source + ".log", "a") as log:
            log.write("download\\n")
        data = Path(source).read_bytes()
        Path(target).write_bytes(data[:1])
        time.sleep(0.5)
        Path(target).write_bytes(data)

sys.stdout.write(RemoteFile(Slow(), sys.argv[1], "content", 5).opened(Path.read_text))
"""


@pytest.fixture
def remote(node):
    fs, path = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/moments.arrow"
    fs.pipe_file(path, b"12345")
    return RemoteFile(fs, path, path, 5)


def opening(source, node):
    return subprocess.Popen(
        [sys.executable, "-c", OPENS, source],
        env=os.environ | {"TMPDIR": str(node)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_want_the_same_file_download_it_once(node, tmp_path):
    source = tmp_path / "file"
    source.write_text("12345")
    processes = [opening(source, node) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["12345"] * 3
    assert Path(f"{source}.log").read_text() == "download\n"


def test_the_process_that_downloads_may_be_killed(node, tmp_path):
    source = tmp_path / "file"
    source.write_text("12345")
    first = opening(source, node)
    while not Path(f"{source}.log").exists():
        assert first.poll() is None
    first.kill()
    first.wait()
    assert opening(source, node).communicate(timeout=60)[0] == "12345"
    assert [path.name for path in cache.folder().glob("*/file*")] == ["file"]  # nothing torn is left


def test_a_removed_copy_is_fetched_again(remote):
    assert remote.opened(Path.read_bytes) == b"12345"
    remote.remove()
    assert not remote.copy.parent.exists()
    remote.remove()
    assert remote.opened(Path.read_bytes) == b"12345"


def test_a_file_that_came_in_part_is_no_copy(remote):
    longer = RemoteFile(remote.fs, remote.path, remote.content, 6)
    with pytest.raises(OSError, match="got 5 of 6 bytes"):
        longer.opened(Path.read_bytes)
    assert list(cache.folder().glob("*/*.arrow*")) == []


def test_a_disk_that_fills_up_is_one_clear_line_and_leaves_nothing(remote, monkeypatch):
    def fills_up(self, source, target, **more):
        Path(target).write_bytes(b"12")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(remote.fs), "get_file", fills_up)
    with pytest.raises(ValueError, match=r"dpt_ray-\d+: .*\(1 files\).* set TMPDIR") as error:
        remote.opened(Path.read_bytes)
    assert "\n" not in str(error.value)
    assert list(cache.folder().glob("*/*.arrow*")) == []


def test_copies_unused_for_long_make_room_for_others_the_oldest_first(node, monkeypatch):
    fs, files = fsspec.filesystem("memory"), []
    for number in range(5):
        path = f"/{uuid.uuid4().hex}/{number}.arrow"
        fs.pipe_file(path, b"12345")
        files.append(RemoteFile(fs, path, path, 5))
    for number, file in enumerate(files[:4]):
        file.opened(Path.read_bytes)
        os.utime(file.copy, (number, number))  # used long ago, the first one the longest
    files[1].opened(Path.read_bytes)  # and this one now
    held = files[2]._locked()
    held.acquire()  # by another process, which opens it

    def usage(folder):
        copies = sum(file.copy.exists() for file in files)
        return SimpleNamespace(total=100, free=10 + 5 * (4 - copies))  # a tenth, and what was removed

    monkeypatch.setattr(cache.shutil, "disk_usage", usage)
    files[4].opened(Path.read_bytes)
    held.release()
    assert [file.copy.exists() for file in files] == [False, True, True, True, True]
    assert files[0].opened(Path.read_bytes) == b"12345"
    assert [file.copy.exists() for file in files] == [True, True, False, True, True]
