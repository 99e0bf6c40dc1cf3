"""Random access to the images of an index, for a training whose pixels do not fit into memory."""

from __future__ import annotations

import logging
from collections import OrderedDict

import numpy as np
import pyarrow as pa

from dpt_ray.config import ConfigError
from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.decode import BadImage, Mode, decode
from dpt_ray.data.index import read_bytes, read_row_group

CACHED = 1 << 30  # bytes of Parquet row groups that a process keeps
NAMED = 3  # unreadable images that an error names

_log = logging.getLogger("dpt_ray")


class RawImages:
    """The cropped pixels of index rows, read and decoded when they are asked for.

    Files and the members of tars are read by their range, concurrently from object stores. A Parquet image
    costs the reading of its row group, of which the latest are kept up to 1 GiB: of larger Parquet files take
    the rows by `training.order.ShardWindows`, or write them as tars. Nothing is held open, so that it serves
    in forked processes.
    """

    def __init__(self, rows: pa.Table, how: Crop, mode: Mode, max_bad_fraction: float) -> None:
        """`rows` are those of `data.index`, for example of one split, or of `class_ranges.locate_images`."""
        self._rows = rows.select(["id", "uri", "offset", "length"]).combine_chunks()
        self._how, self._mode, self._most = how, mode, max_bad_fraction
        self._row_groups = RowGroups(CACHED)
        self.unreadable: dict[str, str] = {}  # the reason by id, of images that this process met

    def __len__(self) -> int:
        """Return the number of rows, including unreadable images."""
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Return the pixels (*rows.shape, size, size, C) uint8 of the images at `rows`, in that order."""
        return self.read(rows)[0]

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels (*rows.shape, size, size, C) uint8 at `rows`, and the rows that they are of.

        An unreadable image is left out, named in the log and counted in `unreadable`: the next row takes its
        place, the first after the last. Raises ConfigError for more of them than `max_bad_fraction`.
        """
        size, wanted = self._how.size, np.array(rows, np.int64).reshape(-1)
        pixels = np.empty((len(wanted), size, size, 1 if self._mode == "L" else 3), np.uint8)
        places = np.arange(len(wanted))
        while len(places):
            part = self._rows.take(wanted[places])
            encoded = read_bytes(part, self._row_groups.images)
            named = zip(places, part["id"].to_pylist(), encoded, strict=True)
            places = np.array([k for k, name, data in named if not self._read(name, data, pixels[k])], int)
            wanted[places] = (wanted[places] + 1) % len(self)
        return pixels.reshape(*np.shape(rows), *pixels.shape[1:]), wanted.reshape(np.shape(rows))

    def _read(self, identifier: str, data: bytes, out: np.ndarray) -> bool:
        """Write an image's pixels into `out`; return whether it can be read."""
        try:
            out[:] = crop(decode(data, self._mode), self._how)
        except BadImage as error:
            self._leave_out(identifier, error.reason)
            return False
        except ValueError as error:
            raise ValueError(f"image {identifier}: {error}") from None
        return True

    def _leave_out(self, identifier: str, reason: str) -> None:
        if identifier not in self.unreadable:
            _log.warning("image %s is left out: %s", identifier, reason)
        self.unreadable[identifier] = reason
        count = len(self.unreadable)
        if count > self._most * len(self) or count == len(self):
            first = "; ".join(f"{name} ({why})" for name, why in list(self.unreadable.items())[:NAMED])
            raise ConfigError(
                f"data.max_bad_fraction: {self._most:g}, but at least {count} of {len(self)} "
                f"images cannot be read: {first}; repair or remove them, or raise the limit"
            )


class RowGroups:
    """The image columns of the latest row groups of Parquet files, of at most `limit` bytes or one."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._held: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

    def images(self, uri: str, group: int) -> pa.ChunkedArray:
        """Return the encoded images of a row group."""
        key = uri, group
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        found = self._held[key] = read_row_group(uri, group)
        self._bytes += found.nbytes
        while self._bytes > self._limit and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return found
