"""Which generated images stage 3 uses where a classifier has to agree with their class."""

import numpy as np
import pytest

from dpt_ray.data.rows import ImageRows, Rows
from dpt_ray.learners.agreement import agree, warn_of_short_classes
from dpt_ray.learners.linear_probe import fit, fit_stage


def images(label, index):
    """ImageRows with a feature for each image that is its place in the lists."""
    rows = ImageRows.__new__(ImageRows)
    rows.label, rows.index = np.array(label), np.array(index)
    rows.features = np.arange(len(label), dtype=np.float32)[:, None]
    return rows


def test_an_image_passes_with_its_own_class_and_enough_confidence():
    # softmax((ln 3, 0) / 1) = (3/4, 1/4); at temperature 2 it is (sqrt 3, 1) / (1 + sqrt 3) = (0.634, 0.366)
    features = np.log([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]])
    labels, W = np.array([0, 1, 1]), np.eye(2)
    assert agree(features, labels, W, 1.0, 0.0).tolist() == [True, False, True]
    assert agree(features, labels, W, 1.0, 0.74).tolist() == [True, False, True]
    assert agree(features, labels, W, 1.0, 0.76).tolist() == [False, False, False]
    assert agree(features, labels, W, 2.0, 0.63).tolist() == [True, False, True]
    assert agree(features, labels, W, 2.0, 0.64).tolist() == [False, False, False]


def test_the_next_images_of_a_class_take_the_place_of_those_that_do_not_pass():
    #                 0  1  2  3  4  5  6
    rows = images([1, 0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3])
    passes = np.array([True, True, False, False, True, True, True])
    found = rows.first(2, passes)
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.index.tolist() == [1, 4, 0, 5]


def test_a_class_with_too_few_has_fewer():
    rows = images([0, 0, 1, 1], [0, 1, 0, 1])
    found = rows.first(2, np.array([True, True, False, True]))
    assert (found.labels.tolist(), found.index.tolist()) == ([0, 0, 1], [0, 1, 3])


def test_where_all_pass_nothing_changes():
    rng = np.random.default_rng(0)
    places = rng.permutation([(label, index) for label in range(4) for index in range(6)])
    rows = images(places[:, 0], places[:, 1])
    every, none = rows.first(3, np.ones(24, bool)), rows.first(3)
    assert every.index.tolist() == none.index.tolist()
    assert every.labels.tolist() == none.labels.tolist()


@pytest.mark.parametrize(("labels", "short"), [([0, 0, 1, 1], 0), ([0, 0, 1], 1), ([1], 2)])
def test_classes_that_have_too_few_are_told_with_the_remedy(labels, short, caplog):
    rows = Rows(np.zeros((4, 1), np.float32), np.array(labels))
    warn_of_short_classes("retrained", rows, ["ash", "elm"], 2)
    assert ("raise generate.images_per_class" in caplog.text) == bool(short)
    assert (f"{short} of 2 classes have fewer than 2" in caplog.text) == bool(short)
    if short == 2:
        assert "(class ash: 0)" in caplog.text


@pytest.mark.parametrize("real_weight", [1.0, "balanced"])
def test_where_no_image_passes_stage_3_is_the_probe(real_weight):
    rng = np.random.default_rng(0)
    few = Rows(rng.normal(size=(8, 3)).astype(np.float32), np.arange(8) % 2)
    none = images([0, 1], [0, 0]).first(1, np.zeros(2, bool))
    found = fit_stage(few, none, real_weight, 2, 0.0025)
    np.testing.assert_array_equal(found.weights, fit([few], 2, l2=0.0025).weights)
