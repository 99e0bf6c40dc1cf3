"""The graph of nearest neighbours on disk: a row for each image, opened by plain pyarrow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpt_ray.data.shards import matrix, read_columns
from dpt_ray.store.artifact import Artifact


def write_neighbours(path: Path, ids: pa.Array, neighbours: np.ndarray, cosines: np.ndarray) -> None:
    """Write rows of `id`, `neighbours` (n, k) int32 (positions in the whole graph) and `cosines` (n, k)."""
    k = neighbours.shape[1]
    columns = {
        "neighbours": pa.array(neighbours.astype(np.int32).ravel()),
        "cosines": pa.array(cosines.astype(np.float32).ravel()),
    }
    lists = {name: pa.FixedSizeListArray.from_arrays(values, k) for name, values in columns.items()}
    pq.write_table(pa.table({"id": ids, **lists}), path)


def read_graph(graph: Artifact) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Return ids (n,), neighbours (n, k) int32 as positions in the ids, and cosines (n, k) float32."""
    table = read_columns(graph, ["id", "neighbours", "cosines"]).combine_chunks()
    neighbours, cosines = (matrix(table[name].chunk(0)) for name in ("neighbours", "cosines"))
    return table["id"].combine_chunks(), neighbours, cosines
