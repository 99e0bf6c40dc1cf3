"""Two runs on one cluster at once, each asking for all of it."""

import json
import os
import subprocess
import sys

from tests.helpers.paths import ROOT

RUN = """
import json, sys, time
from dpt_ray.cluster.session import connect
from dpt_ray.cluster.units import stream_units
from dpt_ray.config.sections import Compute

compute = Compute(actors=4)
connect(compute)


class Sleep:
    def __call__(self, unit):
        time.sleep(2)
        return unit


units = [{"run": sys.argv[1], "shard": n} for n in range(8)]
began = time.time()
found = list(stream_units(units, lambda unit: unit, Sleep, {}, compute))
print(json.dumps({"began": began, "ended": time.time(), "units": found}))
"""


def test_both_finish_though_the_actors_of_one_leave_no_room_for_the_others(cluster):
    """2 CPUs, of which a run's three actors and a reader take all but a quarter."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, name],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "other")
    ]
    told = {}
    for name, run in zip(("one", "other"), runs, strict=True):
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        told[name] = json.loads(out.splitlines()[-1])
        assert sorted(unit["shard"] for unit in told[name]["units"]) == list(range(8))
        assert {unit["run"] for unit in told[name]["units"]} == {name}
    one, other = told["one"], told["other"]
    assert max(one["began"], other["began"]) < min(one["ended"], other["ended"])  # they were at it at once
