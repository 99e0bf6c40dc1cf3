"""One writer per identity: a lease in the artifact's folder, kept alive by a heartbeat.

A lease is acquired by a conditional put (create if absent). Its holder rewrites it every few seconds. A
waiting process takes it over when its content has not changed for `LIFETIME` by the waiter's own clock,
or at once when the holder was a process of this machine, and of the same container, that is dead.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from dpt_ray.store.artifact import Artifact

HEARTBEAT = 5.0  # seconds
LIFETIME = 30.0
POLL = 1.0
NAME = "lease.json"


class Lease:
    """Context manager that makes this process the only writer of an artifact; blocks until it is.

    `on_wait(holder)` is called at every poll while another process holds the lease. `on_lost(holder)` is
    called, in a thread of its own, when another process has taken it over: this one was suspended, or away
    from the storage, for longer than `LIFETIME`, and must write no more.
    """

    def __init__(
        self,
        artifact: Artifact,
        on_wait: Callable[[str], None] = lambda holder: None,
        on_lost: Callable[[str], None] = lambda holder: None,
    ) -> None:
        self._artifact, self._on_wait, self._on_lost = artifact, on_wait, on_lost
        process = {"host": socket.gethostname(), "pid": os.getpid(), "processes": _processes()}
        self._owner = {**process, "token": uuid.uuid4().hex}
        self._stop = threading.Event()
        self._beats = 0

    def __enter__(self) -> Lease:
        seen, since, took_over = b"", time.monotonic(), False
        while not self._acquire(took_over):
            content = self._read()
            if content != seen:
                seen, since = content, time.monotonic()
            took_over = _is_dead(content) or time.monotonic() - since > LIFETIME
            if took_over:
                self._remove()
                continue
            if content:
                self._on_wait(_holder(content))
            time.sleep(POLL)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.held:
            self._remove()

    @property
    def held(self) -> bool:
        """Whether this process still holds the lease."""
        return str(self._owner["token"]).encode() in self._read()

    def _acquire(self, took_over: bool) -> bool:
        """Create the lease; after a takeover, check that no other waiter has taken it over as well."""
        if not self._create():
            return False
        if took_over:
            time.sleep(POLL)
        return not took_over or self.held

    def _content(self) -> bytes:
        self._beats += 1
        return json.dumps({**self._owner, "beat": self._beats}).encode()

    def _create(self) -> bool:
        path = self._artifact.path(NAME)
        try:
            if self._artifact.is_local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with Path(path).open("xb") as file, _removed_if_unfinished(Path(path)):
                    file.write(self._content())
                    file.flush()
            else:  # S3 and GCS: a put that fails if the object exists
                self._artifact.fs.pipe_file(path, self._content(), mode="create")
        except FileExistsError:
            return False
        return True

    def _read(self) -> bytes:
        return _content(self._artifact)

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            self._artifact.fs.rm_file(self._artifact.path(NAME))

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(Exception):  # retry; each storage raises errors of its own
                if self.held:
                    self._artifact.write_bytes(NAME, self._content())
                elif (other := self._read()) or not self._create():  # a removed lease is taken again
                    self._on_lost(_holder(other))
                    return


def live_holders(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return who holds the lease of those artifacts, by the keys given, whose lease is alive.

    Such a lease changes with the next heartbeat. Blocks until every lease has changed or is gone, at most for
    `LIFETIME`; those of dead processes of this machine are not waited for.
    """
    waiting = {key: _content(artifact) for key, artifact in artifacts.items()}
    waiting = {key: content for key, content in waiting.items() if content and not _is_dead(content)}
    holders: dict[str, str] = {}
    since = time.monotonic()
    while waiting and time.monotonic() - since < LIFETIME:
        time.sleep(POLL)
        now = {key: _content(artifacts[key]) for key in waiting}
        holders |= {key: _holder(now[key]) for key in waiting if now[key] not in (b"", waiting[key])}
        waiting = {key: content for key, content in waiting.items() if now[key] == content}
    return holders


@contextmanager
def _removed_if_unfinished(path: Path) -> Iterator[None]:
    """Remove a lease that a full disk has left empty: its process would be waited for."""
    try:
        yield
    except OSError:
        path.unlink()
        raise


def _content(artifact: Artifact) -> bytes:
    """Return what an artifact's lease says, nothing where there is none."""
    with suppress(FileNotFoundError):
        return artifact.read_bytes(NAME)
    return b""


def _holder(content: bytes) -> str:
    """Return the process and host in a lease, for display."""
    try:
        holder = json.loads(content)
    except ValueError:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}"


def _processes() -> str:
    """Return what those have in common to whom a pid means the same process.

    A host's name is not enough: containers share it, and clones of a machine have it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _is_dead(content: bytes) -> bool:
    try:
        holder = json.loads(content)
    except ValueError:
        return False  # still being written: it will be complete, or expire
    if holder.get("processes") != _processes():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
