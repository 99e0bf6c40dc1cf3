"""The units that generated images are made in."""

import pytest

from dpt_ray.data import class_ranges
from dpt_ray.data.class_ranges import class_range_of, items


@pytest.mark.parametrize(("per_shard", "classes"), [(1, 3), (4, 3), (4, 7)])
def test_the_unit_of_an_image_is_the_one_that_holds_it(monkeypatch, per_shard, classes):
    monkeypatch.setattr(class_ranges, "CLASSES_PER_SHARD", 3)
    for unit in class_ranges.class_ranges(10, per_shard, classes):
        for label, index in items(unit):
            assert class_range_of(label, index, per_shard, classes) == unit


def test_the_unit_of_a_far_image_is_found_without_those_before_it():
    assert class_range_of(0, 10**12, 16, 1000)["indices"] == [10**12, 10**12 + 16]
