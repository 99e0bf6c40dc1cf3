"""In which order nodes are made."""

import pytest

from dpt_ray.engine.execute import steps
from dpt_ray.engine.node import needed
from tests.helpers.toy import toy_node


def test_a_group_waits_for_the_inputs_of_all_its_members():
    a = toy_node("a")
    first, b = toy_node("first", a, group="g"), toy_node("b", a)
    second = toy_node("second", b, group="g")
    assert [step.name for step in steps([first, second])] == ["a", "b", "g"]


def test_groups_that_wait_for_each_other_are_refused():
    one = toy_node("one", group="g")
    between = toy_node("between", one)
    with pytest.raises(ValueError, match=r"\['between', 'g'\] depend on each other"):
        steps([toy_node("two", between, group="g")])


def test_a_node_that_several_need_is_visited_once():
    a = toy_node("a")
    b, c = toy_node("b", a), toy_node("c", a)
    assert [n.name for n in needed([toy_node("d", b, c)])] == ["a", "b", "c", "d"]
