"""In which order nodes are made."""

import pytest

from dpt_ray.engine.execute import steps
from dpt_ray.engine.node import Node, topological


def node(name, *inputs, group=""):
    return Node(name, name, "maker", 1, {}, {source.name: source for source in inputs}, group=group)


def test_a_group_waits_for_the_inputs_of_all_its_members():
    a = node("a")
    first, b = node("first", a, group="g"), node("b", a)
    second = node("second", b, group="g")
    assert [step.name for step in steps([first, second])] == ["a", "b", "g"]


def test_groups_that_wait_for_each_other_are_refused():
    one = node("one", group="g")
    between = node("between", one)
    with pytest.raises(ValueError, match=r"\['between', 'g'\] wait for each other"):
        steps([node("two", between, group="g")])


def test_a_node_that_several_need_is_visited_once():
    a = node("a")
    b, c = node("b", a), node("c", a)
    assert [n.name for n in topological([node("d", b, c)])] == ["a", "b", "c", "d"]
