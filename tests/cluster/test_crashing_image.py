"""An image whose decoder crashes the process that reads it: the run goes on without that image."""

import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers.crashes import CRASHES, crashing
from tests.helpers.images import encoded
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import TINY, TinyRun

IMAGES = 300  # of each class: three units


@pytest.mark.cluster
def test_it_is_quarantined_and_the_others_of_its_unit_are_not(tmp_path):
    for name in ("oak", "pine"):
        folder = tmp_path / "own" / name
        folder.mkdir(parents=True)
        for number in range(IMAGES):
            (folder / f"{number:03d}.png").write_bytes(encoded(np.full((8, 8), number % 256, np.uint8)))
    crash = tmp_path / "own" / "oak" / "123.png"
    crash.write_bytes(crash.read_bytes() + CRASHES["SIGSEGV"])
    own = ("data.source=folder", f"data.uri={tmp_path / 'own'}", "data.max_bad_fraction=0.01")
    run = TinyRun(tmp_path / "out", (*TINY, *own))
    # A cluster of its own, whose processes crash at the image. It is the extraction that reads images there.
    environment = os.environ | {"RAY_ADDRESS": ""}
    crashing(environment.__setitem__, tmp_path)
    made = f"from tests.helpers.tiny_run import *; TinyRun(Path({str(run.output)!r}), {run.overrides!r})"

    done = subprocess.run(
        [sys.executable, "-c", f"{made}.make('moments')"], env=environment, cwd=ROOT, capture_output=True
    )

    assert done.returncode == 0, done.stderr
    moments = run.artifact("moments")
    assert moments.manifest["rows"] == 2 * IMAGES - 1
    listed = pq.read_table(moments.local_file("quarantine.parquet")).to_pylist()
    assert listed == [{"id": "oak/123", "reason": "its decoder ends the process (SIGSEGV)"}]
