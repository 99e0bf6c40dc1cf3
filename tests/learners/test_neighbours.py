"""The graph's neighbours against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from dpt_ray.learners.neighbours import centre_and_normalise, nearest


def rows(n=83, dim=7):
    return np.random.default_rng(0).normal(3, 1, (n, dim)).astype(np.float32)


def test_rows_are_centred_by_column_and_have_length_one():
    wanted = rows().astype(np.float64)
    wanted -= wanted.mean(axis=0)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(centre_and_normalise(rows()), wanted, atol=1e-6)


@pytest.mark.parametrize("block", [5, 16, 4096])
@pytest.mark.parametrize("span", [(0, 83), (30, 41)])
def test_the_neighbours_are_scikit_learns_whatever_the_blocks(block, span):
    features = centre_and_normalise(rows())
    where, cosines = nearest(torch.from_numpy(features), *span, 6, block)
    distances, wanted = NearestNeighbors(n_neighbors=7, metric="cosine").fit(features).kneighbors(features)
    # scikit-learn's first neighbour of a row is the row.
    np.testing.assert_array_equal(where.numpy(), wanted[slice(*span), 1:])
    np.testing.assert_allclose(cosines.numpy(), 1 - distances[slice(*span), 1:], atol=1e-5)


@pytest.mark.parametrize("k", [0, 83, 100])
def test_more_neighbours_than_others_are_refused(k):
    with pytest.raises(ValueError, match=f"{k} neighbours among 83 images"):
        nearest(torch.from_numpy(rows()), 0, 83, k)
