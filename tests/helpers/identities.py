"""The identities of the digits' run, and what settings change of them."""

from dpt_ray.config import load_config
from dpt_ray.pipeline.flow import flow
from tests.helpers.paths import DIGITS


def digests(*overrides, path=DIGITS):
    return {name: node.reference for name, node in flow(load_config(path, overrides)).items()}


def changed(*overrides, base=()):
    """The nodes whose identity (with its extent) is another one with the overrides."""
    before, after = digests(*base), digests(*base, *overrides)
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}
