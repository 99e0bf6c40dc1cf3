"""Which images to label: one near the centre of each cluster of the features, the largest clusters first.

The rule is that of TypiClust (Hacohen et al. 2022, arXiv 2202.02794): as many clusters as there will be
labels; those with the fewest labels come first, and of these the largest. It takes the densest image of a
cluster, this the one that is closest to the centre, which needs no neighbours (docs/labelling.md compares
the two).
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

MOST_CLUSTERS = 500  # as in TypiClust: further images come from the same clusters
SMALL_CLUSTER = 5  # images: outliers rather than a kind of image, taken last
EXACT = 5_000_000  # rows x clusters; above it k-means sees a batch of rows at a time
BATCH_ROWS = 5000
CHUNK_ROWS = 4096


def suggest(features: np.ndarray, count: int, given: np.ndarray, seed: int) -> np.ndarray:
    """Return the positions of the `count` images to label next, in the order of their use.

    `features` (n, dim) float32 are normalised rows, `given` the positions of the images that have a label.
    The result depends on these and the seed alone. k-means of at most `EXACT` copies the features; of more it
    needs 4 x clusters x (dim + BATCH_ROWS) bytes beside them. Raises
    ValueError where fewer than `count` images have no label.
    """
    free = np.ones(len(features), bool)
    free[given] = False
    if not 1 <= count <= free.sum():
        raise ValueError(f"{count} images to label, and {free.sum()} have no label: ask for fewer")
    cluster, centres = k_means(features, min(count + len(given), MOST_CLUSTERS), seed)
    # The images of each cluster that have no label, the most central first.
    order = np.lexsort((_distances(features, cluster, centres), cluster))
    order = order[free[order]]
    own = cluster[order]
    rank = np.arange(len(order)) - np.searchsorted(own, own)
    sizes = np.bincount(cluster, minlength=len(centres))
    labelled = np.bincount(cluster[given], minlength=len(centres))
    # An image comes after as many of its cluster as have a label or come before it.
    first = np.lexsort((-sizes[own], labelled[own] + rank, sizes[own] <= SMALL_CLUSTER))
    return order[first[:count]]


def k_means(features: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster (n,) of each row and the centres (clusters, dim), by scikit-learn's k-means."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if len(features) * clusters <= EXACT:
        method = KMeans(clusters, n_init=1, random_state=seed)
    else:
        method = MiniBatchKMeans(clusters, n_init=3, batch_size=BATCH_ROWS, random_state=seed)
    with threadpool_limits(1):  # sums of several threads are rounded in the order in which these finish
        found = method.fit(features)
    return found.labels_, found.cluster_centers_


def _distances(features: np.ndarray, cluster: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row to the centre of its cluster."""
    found = np.empty(len(features), np.float32)
    for start in range(0, len(features), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        found[part] = np.square(features[part] - centres[cluster[part]]).sum(axis=1)
    return found
