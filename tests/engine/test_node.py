"""In which order nodes are made."""

import pytest

from dpt_ray.engine.execute import steps
from dpt_ray.engine.node import Node, NoSettings, Stage, needed, one_of, reads
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


class Several(Stage):
    """A stage that may have more than one of an input."""

    artifact = "several"
    inputs = reads(
        {"part": one_of("a", "b", hashed_as="piece", several=True), "one": one_of("a", optional=True)}
    )

    @classmethod
    def make(cls, task):
        return {}


def several(**inputs):
    given = {key.replace("__", ":"): node for key, node in inputs.items()}
    return Node.of("it", Several, NoSettings(), given, lambda key, source: "")


def test_further_inputs_of_a_kind_count_under_its_name_and_their_own():
    a, b = toy_node("a"), toy_node("b")
    node = several(part=a, part__x=b)
    assert node.hashed_inputs == {"piece": a, "piece:x": b}
    assert len({several(part=a).digest, node.digest, several(part=a, part__y=b).digest}) == 3


@pytest.mark.parametrize("key", ["one__x", "other", "other__x"])
def test_an_input_that_is_not_declared_so_is_refused(key):
    a = toy_node("a")
    with pytest.raises(TypeError, match=f"declares no input {key.replace('__', ':')}"):
        several(part=a, **{key: a})


def test_the_first_of_several_is_needed_and_each_has_to_be_of_the_kind():
    with pytest.raises(TypeError, match="needs the input part"):
        several(part__x=toy_node("a"))
    with pytest.raises(TypeError, match="part:x is a or b, not several"):
        several(part=toy_node("a"), part__x=several(part=toy_node("b")))


def test_a_node_that_several_need_is_visited_once():
    a = toy_node("a")
    b, c = toy_node("b", a), toy_node("c", a)
    assert [n.name for n in needed([toy_node("d", b, c)])] == ["a", "b", "c", "d"]
