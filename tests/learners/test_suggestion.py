"""Which images to label, against clusters that are known."""

import numpy as np
import pytest

from dpt_ray.learners import suggestion
from dpt_ray.learners.suggestion import k_means, suggest

SIZES = (40, 30, 20, 10)
NONE = np.array([], int)


def blobs(sizes=SIZES, seed=0):
    """Features of tight clusters far apart, shuffled; the cluster of each row."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = 10 * np.eye(len(sizes), 8)
    return (centres[label] + rng.normal(0, 0.1, (len(label), 8))).astype(np.float32), label


def most_central(features, label, cluster, besides=()):
    """The row closest to the mean of its cluster, by plain numpy."""
    mine = [row for row in np.flatnonzero(label == cluster) if row not in besides]
    mean = features[label == cluster].astype(float).mean(0)
    return min(mine, key=lambda row: ((features[row] - mean) ** 2).sum())


def test_the_most_central_image_of_each_cluster_comes_the_largest_first():
    features, label = blobs()
    expected = [most_central(features, label, cluster) for cluster in range(4)]
    assert suggest(features.copy(), 4, NONE, 0).tolist() == expected


def test_clusters_with_a_labelled_image_are_passed_over():
    features, label = blobs()
    given = np.array([np.flatnonzero(label == 0)[3], np.flatnonzero(label == 2)[5]])
    expected = [most_central(features, label, cluster) for cluster in (1, 3)]
    assert suggest(features.copy(), 2, given, 0).tolist() == expected


def test_more_images_than_clusters_come_in_rounds(monkeypatch):
    monkeypatch.setattr(suggestion, "MOST_CLUSTERS", 4)
    features, label = blobs()
    first = [most_central(features, label, cluster) for cluster in range(4)]
    second = [most_central(features, label, cluster, first) for cluster in range(2)]
    assert suggest(features.copy(), 6, NONE, 0).tolist() == first + second


def test_a_cluster_with_two_labels_waits_for_those_with_one(monkeypatch):
    monkeypatch.setattr(suggestion, "MOST_CLUSTERS", 3)
    features, label = blobs((40, 30, 20))
    given = np.array([*np.flatnonzero(label == 0)[:2], *np.flatnonzero(label == 1)[:1]])
    assert label[suggest(features.copy(), 4, given, 0)].tolist() == [2, 1, 2, 0]


def test_outliers_come_last(monkeypatch):
    monkeypatch.setattr(suggestion, "MOST_CLUSTERS", 3)
    features, label = blobs((40, 30, 4))
    assert label[suggest(features.copy(), 3, NONE, 0)].tolist() == [0, 1, 0]
    assert sorted(suggest(features.copy(), 74, NONE, 0).tolist()) == list(range(74))


@pytest.mark.parametrize("exact", [10, 10_000])
def test_the_seed_decides_and_nothing_else(monkeypatch, exact):
    monkeypatch.setattr(suggestion, "EXACT", exact)
    features = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    one, again, other = (suggest(features.copy(), 20, NONE, seed).tolist() for seed in (0, 0, 1))
    assert one == again != other
    assert len(set(one)) == 20


def test_batches_find_the_clusters_too(monkeypatch):
    monkeypatch.setattr(suggestion, "EXACT", 10)
    features, label = blobs()
    cluster, centres = k_means(features, 4, 0)
    assert len(set(zip(cluster.tolist(), label.tolist(), strict=True))) == 4
    assert centres.shape == (4, 8)


@pytest.mark.parametrize(("count", "given"), [(101, NONE), (91, np.arange(10)), (0, NONE)])
def test_more_images_than_there_are_is_an_error(count, given):
    features, _ = blobs()
    with pytest.raises(ValueError, match="have no label: ask for fewer"):
        suggest(features, count, given, 0)
