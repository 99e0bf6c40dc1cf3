"""A run whose object store fails now and then, and for a while altogether."""

import os

import pytest

from tests.helpers.object_store import Faulty
from tests.helpers.processes import wait_until
from tests.helpers.tiny_run import TinyRun


@pytest.mark.cluster
def test_a_run_outlives_a_storage_that_fails_now_and_then_and_for_a_while(finished, s3_bucket):
    uri, fs = s3_bucket
    faulty = Faulty(os.environ["AWS_ENDPOINT_URL"], share=0.05, seed=0)
    remote = TinyRun(f"{uri}/out", (*finished.overrides, "compute.actors=2"))
    try:
        driver = remote.start("extract", RAY_ADDRESS="", AWS_ENDPOINT_URL=faulty.endpoint)
        features = f"{uri.removeprefix('s3://')}/out/store/features"
        wait_until(lambda: fs.exists(features) or fs.invalidate_cache(), driver)
        faulty.outage(20)  # longer than s3fs waits by default
        _, error = driver.communicate(timeout=300)
        assert driver.returncode == 0, error
    finally:
        faulty.shutdown()
    assert {"503", "500", "cut"} <= faulty.faults.keys()
    for name in ("features", "moments"):
        published = {key: shard["sha256"] for key, shard in remote.artifact(name).shards().items()}
        assert published == {key: s["sha256"] for key, s in finished.artifact(name).shards().items()}, name
