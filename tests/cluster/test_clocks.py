"""A run whose wall clock jumps by days, forward and back, every second; by a patch of Python's clock."""

import os
import re
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dpt_ray.engine.progress import repeating
from dpt_ray.engine.spending import attempts
from dpt_ray.store.artifact import Store
from dpt_ray.store.lease import Lease
from tests.helpers.clocks import DAY, Clock
from tests.helpers.cluster import gpu_head
from tests.helpers.processes import kill_session

# Reading tasks, training workers, actors, a fit and trials, and stages of the driver.
MADE = ("pseudo_labels", "denoiser", "samples", "retrained", "sweep")
MADE_LAST = ("evaluation", "report")
# A GPU that the cluster pretends, and a cap far above what the run spends of it, far below a day of it.
GPU = ("compute.train_workers=1", "compute.actor_gpus=0.5", "compute.max_gpu_hours=2")

WAITER = """
import sys, time
from dpt_ray.store.artifact import Store
from dpt_ray.store.lease import Lease

with Lease(Store(sys.argv[1]).artifact("toy", "0"), lambda holder: print(time.time(), flush=True)):
    print("taken", flush=True)
"""


@pytest.fixture(scope="module")
def disturbed(finished, tmp_path_factory):
    """The undisturbed run with these stages made again, while the clocks of driver and workers jump."""
    folder = tmp_path_factory.mktemp("clocks")
    clock = Clock(folder)
    run = finished.copy_to(folder / "out", *GPU, without=(*MADE, *MADE_LAST))
    head, address = gpu_head("clocks", **clock.environment)
    try:
        clock.jump()
        with repeating(clock.jump, 1.0):
            code, _, error = run.finish(RAY_ADDRESS=address, **clock.environment)
    finally:
        kill_session(head)
    assert code == 0, error
    return run


def test_it_publishes_what_an_undisturbed_run_does(disturbed, finished):
    for name in MADE:
        assert disturbed.payloads(name) == finished.payloads(name), name
    for name in MADE:  # the clock was wrong all the time
        started = datetime.fromisoformat(disturbed.artifact(name).manifest["started"])
        assert abs((started - datetime.now(UTC)).total_seconds()) > DAY / 2, name


def test_it_records_the_time_that_passed(disturbed):
    for name in (*MADE, *MADE_LAST):
        manifest = disturbed.artifact(name).manifest
        assert 0 <= manifest.get("startup_seconds", 0) <= manifest["seconds"] < DAY / 2, name
    page = Path(disturbed.artifact("report").path("report.html")).read_text()
    assert re.findall(r">[-−]\d[^<]*(?:s|min)<", page) == []


def test_it_spends_what_passed_and_makes_nothing_twice(disturbed):
    tried = attempts(Store(str(disturbed.output)).run_folder(disturbed.config.name))
    assert all(0 < attempt["seconds"] < DAY / 2 for attempt in tried)
    assert set(Counter(name for attempt in tried for name in attempt["made"]).values()) == {1}


def test_its_report_tells_what_was_made_from_what_was_reused(disturbed):
    page = Path(disturbed.artifact("report").path("report.html")).read_text()
    rows = re.findall(r'<tr><th scope="row">([\w ]+)</th>.*<td>(made|reused)</td>', page)
    assert {name.replace(" ", "_") for name, status in rows if status == "made"} == {*MADE, "evaluation"}


def test_a_lease_is_not_taken_over_when_the_clock_jumps(tmp_path):
    clock = Clock(tmp_path)
    with Lease(Store(str(tmp_path)).artifact("toy", "0")):
        waiter = subprocess.Popen(
            [sys.executable, "-c", WAITER, str(tmp_path)],
            env=os.environ | clock.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = float(waiter.stdout.readline())
        for days in (1, -1):
            clock.move(days * DAY)
            waiter.stdout.readline()  # it may have been written before
            for _ in range(3):
                assert round((float(waiter.stdout.readline()) - first) / DAY) == days
    *_, last = waiter.communicate(timeout=60)[0].splitlines()
    assert last == "taken"
