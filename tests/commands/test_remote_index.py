"""Commands that list images on an object store, on the Ray that they start themselves."""

import os
import subprocess
import sys

import pytest

from tests.helpers.image_sources import write_tars
from tests.helpers.paths import DIGITS, ROOT
from tests.helpers.tables import row


def python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.cluster
def test_the_images_are_counted_for_a_plan_of_gpus_that_this_machine_lacks(s3_bucket):
    data = f"data={{source: tar, uri: {write_tars(s3_bucket[0])}, mode: RGB, image_size: 8}}"
    gpus = ("compute.actor_gpus=1", "generate_in=features")
    out = python("-m", "dpt_ray.cli", "plan", str(DIGITS), data, *gpus)
    assert row(out[out.index("computed cost") :], "features")[1] == "10"


@pytest.mark.cluster
def test_init_looks_at_all_of_them(s3_bucket):
    look = "from dpt_ray.commands.inspection import look; import sys; print(look(sys.argv[1], None))"
    said = python("-c", look, write_tars(s3_bucket[0]))
    assert said.startswith("7 train, 3 validation images as tar; 0 labels of 2 classes (")
