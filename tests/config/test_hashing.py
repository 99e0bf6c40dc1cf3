"""Which settings are part of an artifact's identity: a new field can neither hide nor retrain anything."""

from typing import Annotated

import pytest

from dpt_ray.config import load_config
from dpt_ray.config.hashing import HashedFile, HashedIfSet, NotHashed
from dpt_ray.config.sections import SampleSettings
from dpt_ray.engine.node import Node
from dpt_ray.pipeline.flow import flow
from tests.helpers.paths import DIGITS


def identity(settings_class, content=lambda key, source: source, **values):
    """The digest of the digits' samples, sampled with settings of another class."""
    samples = flow(load_config(DIGITS))["samples"]
    settings = settings_class(**samples.settings.model_dump(), **values)
    return Node.of("samples", samples.stage, settings, samples.inputs, content).digest


PRESENT = identity(SampleSettings)


# Names that other stages leave out of their identity.
@pytest.mark.parametrize("name", ["images", "file", "config", "weights", "sampling", "log_every"])
def test_a_new_setting_is_hashed_whatever_its_name(name):
    class More(SampleSettings):
        __annotations__ = {name: int}

    assert len({PRESENT, identity(More, **{name: 1}), identity(More, **{name: 2})}) == 3


def test_an_option_without_a_mark_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match=r"More\.churn: an option must say how it is hashed: .*HashedIfSet"):

        class More(SampleSettings):
            churn: float | None = None


def test_an_option_counts_once_it_is_set():
    class More(SampleSettings):
        churn: Annotated[float | None, HashedIfSet] = None

    assert identity(More) == PRESENT
    assert len({PRESENT, identity(More, churn=0.1), identity(More, churn=0.2)}) == 3


def test_what_says_that_it_is_not_hashed_changes_no_identity():
    class More(SampleSettings):
        preview: Annotated[int | None, NotHashed] = None

    assert identity(More, preview=3) == PRESENT


def test_a_file_counts_by_its_content():
    class More(SampleSettings):
        table: Annotated[str | None, HashedFile(key="generate.table")] = None

    def content(key, source):
        assert key == "generate.table"
        return source.removeprefix("copy of ")

    assert identity(More) == PRESENT
    one, copy, other = (identity(More, content, table=name) for name in ("a", "copy of a", "b"))
    assert one == copy and len({PRESENT, one, other}) == 3
