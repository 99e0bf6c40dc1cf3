"""One writer for an identity: a lease in the artifact's folder, kept alive by a heartbeat.

A lease is taken by a conditional put (create if absent). Its holder rewrites it every few seconds; who
waits for it takes it over when its content has not changed for `LIFETIME` by the waiter's own clock, or
at once when the holder was a process of this machine that no longer lives.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from dpt_ray.store.artifact import Artifact

HEARTBEAT = 5.0  # seconds
LIFETIME = 30.0
POLL = 1.0
NAME = "lease.json"


class Lease:
    """`with Lease(artifact):` the only writer of that artifact. Blocks while another one lives."""

    def __init__(self, artifact: Artifact, on_wait: Callable[[str], None] = lambda holder: None) -> None:
        self._artifact, self._on_wait = artifact, on_wait
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
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
        """Whether the lease is still this process's own."""
        return str(self._owner["token"]).encode() in self._read()

    def _acquire(self, took_over: bool) -> bool:
        """Creates the lease; after a takeover only if no other waiter, judging the same, removed it."""
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
                with Path(path).open("xb") as file:
                    file.write(self._content())
            else:  # S3 and GCS: a put that fails if the object is there
                self._artifact.fs.pipe_file(path, self._content(), mode="create")
        except FileExistsError:
            return False
        return True

    def _read(self) -> bytes:
        with suppress(FileNotFoundError):
            return self._artifact.read_bytes(NAME)
        return b""

    def _remove(self) -> None:
        with suppress(FileNotFoundError):
            self._artifact.fs.rm_file(self._artifact.path(NAME))

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(Exception):  # a storage that is away is tried again; each has errors of its own
                if not self.held:  # taken over: the store's atomic shards keep both writers harmless
                    return
                self._artifact.write_bytes(NAME, self._content())


def _holder(content: bytes) -> str:
    """Return who holds a lease, for a person: its process and host."""
    try:
        holder = json.loads(content)
    except ValueError:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}"


def _is_dead(content: bytes) -> bool:
    try:
        holder = json.loads(content)
    except ValueError:
        return False  # being written; it will either become whole or run out
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
