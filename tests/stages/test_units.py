"""How units stream through an actor, on a real cluster."""

import threading

import pytest

from dpt_ray.sections import Compute
from dpt_ray.stages import cluster as stage_cluster


@pytest.mark.cluster
def test_an_actor_publishes_a_unit_while_it_has_the_next(cluster):
    class Meeting:
        """Publishes a unit only once another one is being computed or published as well."""

        def __init__(self):
            self.both = threading.Barrier(2, timeout=60)

        def __call__(self, unit):
            self.both.wait()
            return unit

    compute = Compute(actors=1)
    stage_cluster.connect(compute)
    units = [{"shard": n} for n in range(4)]
    found = list(stage_cluster.run_units(units, None, Meeting, {}, compute))
    assert sorted(unit["shard"] for unit in found) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "readers"),
    [({"actors": 3}, 3), ({"actors": 2, "actor_gpus": 1.0}, 8), ({"actors": 2, "readers": 5}, 5)],
)
def test_readers_are_as_many_as_the_setting_or_the_actors_ask_for(settings, readers):
    assert stage_cluster.tasks(Compute(**settings))["compute"].size == readers
