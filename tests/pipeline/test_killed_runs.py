"""Real SIGKILLs and broken files: what is published stays, the rest is made as if nothing had happened."""

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from dpt_ray.data.shards import read_images
from dpt_ray.store.checkpoints import checkpoint_names
from dpt_ray.training.log import read_log
from tests.helpers.processes import command_line, kill_group, kill_session, session_pids, wait_until
from tests.helpers.tiny_run import TINY, TinyRun, files, shard_files

# The artifact in whose making the driver is killed: all that the same pass or step makes.
KILLED = {
    "encoder": ("encoder",),
    "features": ("features", "moments"),
    "denoiser": ("denoiser",),
    "samples": ("samples",),
    "sweep": ("sweep",),
}


def started(artifact):
    """Whether a part of an artifact is published: a training checkpoint or a shard."""
    folder = Path(artifact.path(""))
    return any(folder.glob("checkpoints/*.json")) or any(folder.glob("shards/*.json"))


def part_of(artifact):
    """Asserts that the artifact is published in part, and returns the shards that are."""
    assert started(artifact)
    assert not artifact.published, "it was finished before the kill"
    return shard_files(artifact)


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_is_continued_by_the_same_command(name, finished, tmp_path):
    run = finished.copy_to(tmp_path, without=KILLED[name])
    artifact = run.artifact(name)
    driver = run.start()
    wait_until(lambda: started(artifact), driver)
    kill_group(driver)
    before = part_of(artifact)

    code, _, error = run.finish()
    assert code == 0, error
    after = shard_files(artifact)
    assert {key: after[key] for key in before} == before
    for made in KILLED[name]:
        assert run.payloads(made) == finished.payloads(made), made


def test_a_killed_driver_takes_its_own_cluster_with_it(finished, tmp_path):
    run = finished.copy_to(tmp_path, without=("samples",))
    driver = run.start(RAY_ADDRESS="")
    try:
        wait_until(lambda: started(run.artifact("samples")), driver)
        assert any("raylet" in command_line(pid) for pid in session_pids(driver.pid))
        kill_group(driver)
        end = time.monotonic() + 60
        while left := [command_line(pid) for pid in session_pids(driver.pid)]:
            assert time.monotonic() < end, left
            time.sleep(0.1)
    finally:
        kill_session(driver)
    part_of(run.artifact("samples"))
    code, _, error = run.finish(RAY_ADDRESS="")
    assert code == 0, error
    assert run.payloads("samples") == finished.payloads("samples")


def test_a_killed_training_worker_is_replaced_and_the_weights_are_the_same(finished, cluster, tmp_path):
    run = finished.copy_to(tmp_path, "compute.train_workers=1", without=("denoiser",))
    driver = run.start()
    wait_until(lambda: started(run.artifact("denoiser")), driver)
    [worker] = cluster.pids("RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    part_of(run.artifact("denoiser"))
    _, error = driver.communicate(timeout=240)
    assert driver.returncode == 0, error
    assert run.payloads("denoiser") == finished.payloads("denoiser")


def test_a_loss_that_stays_not_finite_stops_both_workers_with_one_line(finished, cluster, tmp_path):
    settings = ("diffusion.learning_rate=1e30", "diffusion.warmup_steps=0", "compute.train_workers=2")
    run = finished.copy_to(tmp_path, *settings, "diffusion.checkpoint_every=100")
    code, _, error = run.finish()
    assert code == 1
    [told] = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert "denoiser: loss or gradient not finite at step" in told
    assert "lower learning_rate" in told
    assert "Traceback" not in error
    assert not run.artifact("denoiser").published
    assert not cluster.pids("RayTrainWorker")


def test_a_killed_actor_is_replaced_and_every_image_is_there_once(finished, cluster, tmp_path):
    run = finished.copy_to(tmp_path, without=("samples",))
    driver = run.start()
    wait_until(lambda: started(run.artifact("samples")), driver)
    [actor] = cluster.pids("GenerateUnit")
    os.kill(actor, signal.SIGKILL)
    part_of(run.artifact("samples"))
    _, error = driver.communicate(timeout=240)
    assert driver.returncode == 0, error
    assert run.payloads("samples") == finished.payloads("samples")
    ids = [i for table in read_images(run.artifact("samples")) for i in table["id"].to_pylist()]
    expected = [f"gen-{label:05d}-{index:07d}" for label in range(10) for index in range(32)]
    assert sorted(ids) == expected


def test_broken_weights_fail_the_stage_with_one_line_and_publish_nothing(finished, tmp_path):
    run = finished.copy_to(tmp_path, without=("samples",))
    os.truncate(run.artifact("denoiser").path("model.safetensors"), 1000)
    code, _, error = run.finish()
    assert code == 1
    told = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert len(told) == 1
    assert "samples" in told[0]
    assert "model.safetensors" in told[0]
    assert "Traceback" not in error
    assert not run.artifact("samples").published
    assert run.artifact("samples").shards() == {}


def test_features_that_are_not_finite_stop_the_run_with_an_image_and_a_remedy(finished, tmp_path):
    run = finished.copy_to(tmp_path, "encoder.precision=bfloat16")
    weights = run.artifact("encoder").path("model.safetensors")
    state = load_file(weights)
    save_file({name: np.full_like(values, np.nan) for name, values in state.items()}, weights)
    code, _, error = run.finish("extract")
    assert code == 1
    [told] = [line for line in error.splitlines() if line.startswith("failed: ")]
    index = pq.read_table(run.artifact("index").local_file("index.parquet"), columns=["id"])
    [named] = re.findall(r"the features of image (\S+) are not finite", told)
    assert named in index["id"].to_pylist()
    assert "set encoder.precision=float32" in told
    assert "Traceback" not in error
    assert not run.artifact("features").shards()


def test_a_broken_shard_is_named_and_what_is_made_of_it_is_not_published(finished, tmp_path):
    run = finished.copy_to(tmp_path, without=("sample_features", "referee_sample_features"))
    broken = run.artifact("samples").listed_shards()[1]
    os.truncate(run.artifact("samples").path(broken["file"]), 1000)
    code, _, error = run.finish()
    assert code == 1
    told = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert len(told) == 1
    assert "extract samples" in told[0]
    assert broken["shard"] in told[0]
    assert "Traceback" not in error
    assert not run.artifact("sample_features").published
    assert broken["shard"] not in run.artifact("sample_features").shards()


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_is_one_line_and_the_same_command_continues(workers, cluster, tmp_path):
    settings = ("pretrain.steps=60", "pretrain.log_every=1", f"compute.train_workers={workers}")
    run = TinyRun(tmp_path, (*TINY, *settings))
    driver = run.start("pretrain")
    encoder = run.artifact("encoder")
    wait_until(lambda: started(encoder), driver)
    os.killpg(driver.pid, signal.SIGINT)
    _, error = driver.communicate(timeout=120)
    assert driver.returncode == 130, error
    assert error.splitlines()[-1] == "stopped; run the same command again to continue"
    assert "Traceback" not in error
    assert not encoder.published
    wait_until_gone(lambda: cluster.pids("RayTrainWorker"))
    index = files(run.artifact("index").path(""))
    newest = int(checkpoint_names(encoder)[-1])
    kept = [record for record in read_log(encoder) if record["step"] <= newest]

    code, _, error = run.finish("pretrain")
    assert code == 0, error
    assert [record["step"] for record in read_log(encoder)] == list(range(1, 61))
    assert read_log(encoder)[:newest] == kept  # speeds and all: they are not made again
    assert files(run.artifact("index").path("")) == index


def wait_until_gone(found, seconds=60):
    end = time.monotonic() + seconds
    while left := found():
        assert time.monotonic() < end, left
        time.sleep(0.05)
