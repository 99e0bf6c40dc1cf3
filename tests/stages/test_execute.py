"""How a step is made and published, with a maker that is the test's."""

import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from dpt_ray.artifacts import Store
from dpt_ray.sections import Compute
from dpt_ray.stages.display import Display
from dpt_ray.stages.execute import StageError, execute
from dpt_ray.stages.node import Node


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Executes one node whose maker returns some facts; its artifact."""

    def execute_one(**facts):
        monkeypatch.setitem(sys.modules, "dpt_ray.stages.toy", SimpleNamespace(make=lambda task: facts))
        node, store = Node("toy", "toy", "toy", 1, {}), Store(str(tmp_path))
        execute([node], store, Compute(), Display(Console(quiet=True)), {})
        return node.artifact(store)

    return execute_one


def test_a_manifest_that_cannot_be_written_fails_its_stage_in_one_line(made):
    with pytest.raises(StageError, match=r"^toy: ValueError: Out of range float values") as caught:
        made(loss=float("nan"))
    assert "\n" not in str(caught.value)
    assert made(loss=0.5).manifest["loss"] == 0.5
