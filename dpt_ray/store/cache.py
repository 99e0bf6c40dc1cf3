"""Local copies of remote files: one per content and node, complete or absent, shared by all processes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import fsspec
from filelock import BaseFileLock, FileLock, Timeout

T = TypeVar("T")

KEPT_FREE = 0.1  # of the disk: Ray stops making objects where less than a twentieth is free
UNUSED = 600.0  # seconds, after which a copy may be removed for want of room


def folder() -> Path:
    """Return the folder of the copies, below the temporary folder (TMPDIR), private to this user."""
    path = Path(tempfile.gettempdir()) / f"dpt_ray-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@dataclass(frozen=True)
class RemoteFile:
    """A remote file; `content` changes with its bytes, `size` in bytes is None where unknown.

    Copies of one `family` can be removed together.
    """

    fs: fsspec.AbstractFileSystem
    path: str
    content: str
    size: int | None
    family: str = ""

    @property
    def key(self) -> str:
        """The name of the copy's folder."""
        content = hashlib.sha256(self.content.encode()).hexdigest()[:32]
        return f"{_family_key(self.family)}-{content}" if self.family else content

    @property
    def copy(self) -> Path:
        """The path of its copy, whether it exists or not."""
        return folder() / self.key / Path(self.path).name

    def opened(self, open_copy: Callable[[Path], T]) -> T:
        """Return `open_copy(path)` of the copy, downloading it first if needed.

        The copy cannot be removed during the call. Raises ValueError where the disk is full, OSError
        where the download is interrupted.
        """
        with self._locked():
            if self.copy.exists():
                os.utime(self.copy)  # used now
            else:
                _make_room(self.size or 0)
                self._download()
            return open_copy(self.copy)

    def remove(self) -> None:
        """Remove the copy; processes that have it open or mapped keep its content."""
        with self._locked():
            self.copy.unlink(missing_ok=True)
            with suppress(OSError):
                self.copy.parent.rmdir()

    def _download(self) -> None:
        copy = self.copy
        part = copy.with_name(f"{copy.name}.part")  # overwrites that of a killed process
        try:
            copy.parent.mkdir(exist_ok=True)
            self.fs.get_file(self.path, str(part))
            size = part.stat().st_size
            if self.size is not None and size != self.size:
                raise OSError(errno.EIO, f"{self.path}: got {size} of {self.size} bytes; try again")
            part.replace(copy)
        except OSError as error:
            if is_disk_full(error):
                raise _too_small(self.size or 0, 1) from error
            raise
        finally:
            part.unlink(missing_ok=True)

    def _locked(self) -> BaseFileLock:
        """Return the lock of this copy, for threads and processes; a dead process holds none."""
        return FileLock(_locks() / self.key)


def _locks() -> Path:
    locks = folder() / "locks"
    locks.mkdir(exist_ok=True)
    return locks


def _make_room(size: int) -> None:
    """Remove the copies that were used the longest ago, until `size` bytes fit and `KEPT_FREE` stays free."""
    if _fits(size):
        return
    for _, copy in sorted(_removable()):
        if _fits(size):
            return
        with suppress(Timeout), FileLock(_locks() / copy.parent.name, blocking=False):
            shutil.rmtree(copy.parent, ignore_errors=True)


def _fits(size: int) -> bool:
    disk = shutil.disk_usage(folder())
    return disk.free - size >= KEPT_FREE * disk.total


def _removable() -> Iterator[tuple[float, Path]]:
    """Yield when a copy was used, and its path, for each that nobody has used of late."""
    root = folder()
    for place, folders, names in os.walk(root):
        if Path(place) == root:
            folders[:] = {*folders} - {"locks", "scratch"}
            continue
        for copy in (Path(place) / name for name in names):
            with suppress(OSError):  # removed meanwhile
                used = copy.stat().st_mtime
                if time.time() - used > UNUSED:
                    yield used, copy


def remove_family(family: str, but: Path | None = None) -> None:
    """Remove this node's copies of a family except `but`; open and mapped files stay readable."""
    for copy in folder().glob(f"{_family_key(family)}-*"):
        if but is None or copy != but.parent:
            shutil.rmtree(copy, ignore_errors=True)  # another process may be removing it too


def _family_key(family: str) -> str:
    return hashlib.sha256(family.encode()).hexdigest()[:16]


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that is removed after the block, or by a later call if this process is killed."""
    root = folder() / "scratch"
    root.mkdir(exist_ok=True)
    mine = root / uuid.uuid4().hex
    lock_file = root / f"{mine.name}.lock"
    with FileLock(folder() / "scratch.lock"):  # a lock file that exists is locked unless its process died
        _remove_abandoned(root)
        lock = FileLock(lock_file)
        lock.acquire()
    try:
        mine.mkdir()
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        lock.release()


def _remove_abandoned(root: Path) -> None:
    """Remove the scratch folders of dead processes."""
    for lock_file in root.glob("*.lock"):
        with suppress(Timeout), FileLock(lock_file, blocking=False):
            shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def check_space(files: Iterable[RemoteFile]) -> None:
    """Raise ValueError where the files without a copy do not fit, after what is unused was removed."""
    missing = [file.size or 0 for file in files if not file.copy.exists()]
    _make_room(sum(missing))
    if sum(missing) > shutil.disk_usage(folder()).free:
        raise _too_small(sum(missing), len(missing))


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk is full; safetensors says so in its text only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {code})" in str(error) for code in full)


def _too_small(size: int, files: int) -> ValueError:
    free = shutil.disk_usage(folder()).free
    return ValueError(
        f"{folder()}: copying {size / 1e9:.1f} GB ({files} files) to this node, whose disk has "
        f"{free / 1e9:.1f} GB free; free some, or set TMPDIR (where Ray is started) to a folder with more"
    )
