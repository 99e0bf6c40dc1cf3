"""The random labels of a Frechet distance: what they are distributed as, and what they take."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from dpt_ray.evaluation.label_draw import check_counts, images_of_each_class


def test_the_labels_are_uniform_and_independent():
    counts = images_of_each_class(50_000, 1000, seed=0)
    assert counts.shape == (1000,) and counts.sum() == 50_000
    # Of independent labels Pearson's statistic is chi-squared; counts that are all near 50 give a p near 1.
    assert 0.01 < chisquare(counts.numpy()).pvalue < 0.99


def test_the_draw_is_the_seeds():
    first, again, other = (images_of_each_class(500, 10, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_class_that_runs_short_is_told_with_what_it_takes():
    check_counts(np.array([4, 0]), 4)
    with pytest.raises(ValueError, match=r"up to 4 images of a class, not 3: set .* to 4 or more"):
        check_counts(np.array([4, 0]), 3)
