"""Random access to moments in memory-mapped shards, which are copied to this node from remote stores."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpt_ray.data.shards import THREADS, matrix
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.cache import check_space, folder
from dpt_ray.store.records import Shard

LOG_EVERY = 256  # shards
ID_BLOCK = 1 << 16  # bytes; enough for the ids of a shard of some hundred rows in one request

_log = logging.getLogger("dpt_ray")


class MomentsReader:
    """Rows (n, variants, 2C, H, W) float16 of an artifact, from the shards that `hold` has fetched.

    Rows are copied from the mapped file: 118,000 rows of 32 KB per second on one core with warm pages,
    more than any device trains on.
    """

    def __init__(self, artifact: Artifact) -> None:
        manifest = artifact.manifest
        self.shape: tuple[int, ...] = tuple(manifest["shape"])
        self.sizes: tuple[int, ...] = tuple(shard["rows"] for shard in manifest["shards"])
        self._artifact, self._shards = artifact, manifest["shards"]
        self._starts = np.cumsum([0, *self.sizes])
        self._blocks: dict[int, Future[np.ndarray]] = {}
        self._threads = ThreadPoolExecutor(THREADS)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def hold(self, shards: Iterable[int]) -> None:
        """Prefetch these shards in the background, in this order; evict the rest.

        Evicted copies are deleted from this node. Raises ValueError where the first shards do not fit
        on the node's disk.
        """
        wanted = dict.fromkeys(int(shard) for shard in shards if self.sizes[shard])
        new = [shard for shard in wanted if shard not in self._blocks]
        if not self._blocks:
            self._announce(new)
        for shard in self._blocks.keys() - wanted:
            self._evict(shard)
        for shard in new:
            open_shard = partial(self._artifact.open_shard, self._shards[shard], _mapped)
            self._blocks[shard] = self._threads.submit(open_shard)

    def wait(self) -> None:
        """Wait until all held shards are on this node, logging progress."""
        for number, block in enumerate(self._blocks.values(), 1):
            if not block.done() and number % LOG_EVERY == 0:
                _log.info("moments: fetched %d of %d shards", number, len(self._blocks))
            block.result()

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the given rows of held shards, in their order, waiting for shards in transfer.

        Raises ValueError where the node's disk is full, OSError where a shard cannot be downloaded.
        """
        which = np.searchsorted(self._starts, rows, side="right") - 1
        blocks = {shard: self._blocks[shard].result() for shard in set(which.tolist())}
        out = np.empty((len(rows), *self.shape), np.float16)
        places = zip(which.tolist(), rows - self._starts[which], strict=True)
        for place, (shard, row) in enumerate(places):
            out[place] = blocks[shard][row].reshape(self.shape)
        return out

    def close(self) -> None:
        """Cancel transfers; held shards stay on the node for later readers."""
        self._threads.shutdown(cancel_futures=True)

    def _announce(self, shards: list[int]) -> None:
        files = [file for shard in shards if (file := self._artifact.remote_shard(self._shards[shard]))]
        check_space(files)
        if files:
            size = sum(file.size or 0 for file in files)
            _log.info("moments: copying %d shards, %.1f GB, to %s", len(files), size / 1e9, folder())

    def _evict(self, shard: int) -> None:
        block, remote = self._blocks.pop(shard), self._artifact.remote_shard(self._shards[shard])
        if not block.cancel() and remote:
            block.add_done_callback(lambda _: remote.remove())  # immediately if it is done


def read_moment_ids(artifact: Artifact) -> pa.Array:
    """Return the id of every row of moments, reading little more of remote shards than the ids."""
    shards = [shard for shard in artifact.listed_shards() if shard["rows"]]
    with ThreadPoolExecutor(THREADS) as threads:
        return pa.concat_arrays([pa.array([], pa.string()), *threads.map(partial(_ids, artifact), shards)])


def _ids(artifact: Artifact, shard: Shard) -> pa.Array:
    remote = artifact.remote_shard(shard)
    if remote is None:
        return _id_column(pa.memory_map(artifact.path(shard["file"])))
    try:
        return _id_column(pa.memory_map(str(remote.copy)))
    except FileNotFoundError:
        options = {"block_size": ID_BLOCK, "cache_type": "readahead", "size": remote.size}
        with remote.fs.open(remote.path, **options) as source:
            return _id_column(pa.PythonFile(source, mode="r"))


def _id_column(source: pa.NativeFile) -> pa.Array:
    options = pa.ipc.IpcReadOptions(included_fields=[0])
    return pa.ipc.open_file(source, options=options).read_all()["id"].combine_chunks()


def _mapped(path: Path) -> np.ndarray:
    """Return the rows (n, values) of a shard's file, memory-mapped."""
    [batch] = pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_batches()
    return matrix(batch["moments"])
