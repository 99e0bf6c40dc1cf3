"""Nodes of stages that are the test's own."""

from dpt_ray.config.hashing import Settings
from dpt_ray.engine.node import Node, NoSettings, Stage, Task, one_of, reads


def toy_node(name, *inputs, group="", make=dict, settings=None):
    """A node named like its artifact; `make()` returns the facts of what is made."""

    class Toy(Stage[Settings]):
        artifact = name

        @classmethod
        def make(cls, task):
            return make()

    Toy.inputs = reads({source.name: one_of(source.artifact_name) for source in inputs})
    sources = {source.name: source for source in inputs}
    return Node.of(name, Toy, settings or NoSettings(), sources, lambda key, source: "", group=group)


def task_of(node, store, compute, inputs=None):
    """What an executor would hand to the stage of a node."""
    found = {key: source.artifact(store) for key, source in node.inputs.items()} if inputs is None else inputs
    return Task(node, node.settings, node.artifact(store), found, compute, "")
