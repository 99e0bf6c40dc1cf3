"""Decoding in a process of its own: an image whose decoder crashes is lost alone, not its whole unit."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.decode import BadImage, Mode, decode

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

# "fork" would copy the locks of this process's other threads as they are.
SPAWN = multiprocessing.get_context("spawn")


def cut(data: bytes, crops: Mapping[str, Crop], mode: Mode) -> dict[str, np.ndarray]:
    """Return the pixels (H, W, C) uint8 of an image file for each crop, decoded once.

    Raises BadImage where it cannot be used, and ValueError where a crop does not fit the images.
    """
    image = decode(data, mode)
    return {name: crop(image, how) for name, how in crops.items()}


class Apart:
    """`cut`, in a process that is replaced where an image ends it."""

    def __init__(self, crops: Mapping[str, Crop], mode: Mode) -> None:
        self._given = dict(crops), mode
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, data: bytes) -> dict[str, np.ndarray]:
        """Return the pixels of an image. Raises the errors of `cut`, and BadImage where its decoder crashes.

        Raises MemoryError where the process was killed, which is rarely the image's fault.
        """
        connection = self._connection or self._start()
        try:
            connection.send_bytes(data)
            answer: dict[str, np.ndarray] | ValueError = connection.recv()
        except (EOFError, OSError):
            code = self.close()
            if code == -signal.SIGKILL:
                raise MemoryError("its process was killed, as a node without memory does") from None
            raise BadImage(f"its decoder ends the process ({_named(code)})") from None
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def _start(self) -> Connection:
        self._connection, other = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(other, *self._given), daemon=True)
        self._process.start()
        other.close()  # else the end of the process is not seen
        return self._connection

    def close(self) -> int:
        """End the process; return its exit code, 0 without one."""
        if self._connection is None or self._process is None:
            return 0
        self._connection.close()
        self._process.join()
        code = self._process.exitcode or 0
        self._process = self._connection = None
        return code


@contextmanager
def apart(crops: Mapping[str, Crop], mode: Mode) -> Iterator[Apart]:
    """Yield `cut` with these crops in a process of its own, which ends with the context."""
    decoder = Apart(crops, mode)
    try:
        yield decoder
    finally:
        decoder.close()


def _serve(connection: Connection, crops: Mapping[str, Crop], mode: Mode) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        try:
            connection.send(cut(data, crops, mode))
        except ValueError as error:
            connection.send(error)


def _named(code: int) -> str:
    """Return the name of the signal that ended a process, or its exit code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
