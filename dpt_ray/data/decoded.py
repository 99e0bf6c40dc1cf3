"""Decoded units of images, one or all of them, in this process or in others beside it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import numpy as np

from dpt_ray.data.apart import Cut, Pixels, apart, cut
from dpt_ray.data.crops import Crop
from dpt_ray.data.decode import BadImage, Mode
from dpt_ray.data.units import Unit, list_units, read_unit, split_of
from dpt_ray.store.artifact import Artifact

# All images of more units than MANY are decoded by other processes, one for each core, at most MOST. To start
# one takes as long as to decode a thousand small images.
MANY, MOST = 16, 16

T = TypeVar("T")
U = TypeVar("U")


def decode_unit(
    images: Artifact,
    unit: Unit,
    crops: dict[str, Crop],
    mode: Mode,
    pixels_of: Callable[[Sequence[bytes]], list[Cut]] | None = None,
) -> tuple[list[str], Pixels, list[tuple[str, str]]]:
    """Return ids, pixels (n, H, W, C) uint8 for each crop, and (id, reason) of unreadable images.

    `pixels_of` decodes image files for all crops: in this process, or in another (`apart`).
    """
    pixels_of = pixels_of or partial(cut, crops=crops, mode=mode)
    ids: list[str] = []
    bad: list[tuple[str, str]] = []
    pixels: dict[str, list[np.ndarray]] = {name: [] for name in crops}
    named, files = read_unit(images, unit)
    for identifier, found in zip(named, pixels_of(files), strict=True):
        if isinstance(found, BadImage):
            bad.append((identifier, found.reason))
            continue
        if isinstance(found, (ValueError, MemoryError)):
            raise type(found)(f"image {identifier}: {found}")
        ids.append(identifier)
        for name, value in found.items():
            pixels[name].append(value)
    return ids, {name: _stack(values, mode) for name, values in pixels.items()}, bad


def iterate_pixels(
    images: Artifact, how: Crop, mode: Mode, split: str | None = None
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield (ids, pixels) of every unit, or of those of one split, without unreadable images.

    Of many units each core decodes some ahead, in a process that an image may crash.
    """
    units = [unit for unit in list_units(images) if split is None or split_of(unit) == split]
    crops = {"pixels": how}
    if len(units) <= MANY:
        for unit in units:
            ids, pixels, _ = decode_unit(images, unit, crops, mode)
            yield ids, pixels["pixels"]
        return
    count, of_thread = min(len(os.sched_getaffinity(0)), MOST), threading.local()
    with ExitStack() as processes, ThreadPoolExecutor(count) as pool:

        def decoded(unit: Unit) -> tuple[list[str], np.ndarray]:
            if not hasattr(of_thread, "pixels_of"):
                of_thread.pixels_of = processes.enter_context(apart(crops, mode))
            ids, pixels, _ = decode_unit(images, unit, crops, mode, of_thread.pixels_of)
            return ids, pixels["pixels"]

        yield from ahead(pool, decoded, units, count)


def ahead(pool: ThreadPoolExecutor, call: Callable[[U], T], items: Iterable[U], count: int) -> Iterator[T]:
    """Yield call(item) in order with at most `count` running ahead; `pool.map` would start all."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(call, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _stack(values: list[np.ndarray], mode: Mode) -> np.ndarray:
    if not values:
        return np.zeros((0, 1, 1, 1 if mode == "L" else 3), np.uint8)
    return np.stack(values)
