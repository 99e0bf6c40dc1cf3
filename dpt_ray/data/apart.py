"""Decoding in a process of its own: an image whose decoder crashes is lost alone, not its whole unit."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
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

Pixels = dict[str, np.ndarray]  # by the name of a crop, (H, W, C) uint8
Cut = Pixels | ValueError | MemoryError  # of an image, or why there are none


def cut(images: Sequence[bytes], crops: Mapping[str, Crop], mode: Mode) -> list[Cut]:
    """Return the pixels (H, W, C) uint8 of image files for each crop; each file is decoded once.

    In the place of an image that cannot be used is a BadImage; of one that a crop does not fit, a ValueError.
    """
    return [_cut(data, crops, mode) for data in images]


def _cut(data: bytes, crops: Mapping[str, Crop], mode: Mode) -> Cut:
    try:
        image = decode(data, mode)
        return {name: crop(image, how) for name, how in crops.items()}
    except ValueError as error:
        return error


class Apart:
    """`cut`, in a process that is replaced where an image ends it."""

    def __init__(self, crops: Mapping[str, Crop], mode: Mode) -> None:
        self._given = dict(crops), mode
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, images: Sequence[bytes]) -> list[Cut]:
        """Return what `cut` returns, with a BadImage for an image whose decoder crashes.

        For one at which the process is killed it is a MemoryError, which is rarely the image's fault.
        """
        found = self._ask(images)
        if not isinstance(found, int):
            return found
        if len(images) > 1:  # one after another, to find which
            return [result for data in images for result in self([data])]
        if found == -signal.SIGKILL:
            return [MemoryError("the process that decodes it was killed, as a node without memory does")]
        return [BadImage(f"its decoder ends the process ({_named(found)})")]

    def _ask(self, images: Sequence[bytes]) -> list[Cut] | int:
        """Return the results of the process, or where it ended its exit code."""
        connection = self._connection or self._start()
        try:
            connection.send(list(images))
            found: list[Cut] = connection.recv()
        except (EOFError, OSError):
            return self.close()
        return found

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
            images = connection.recv()
        except EOFError:
            return
        connection.send(cut(images, crops, mode))


def _named(code: int) -> str:
    """Return the name of the signal that ended a process, or its exit code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
