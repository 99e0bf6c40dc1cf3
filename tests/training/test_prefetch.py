"""Batches that processes load and prepare, beside those of the training's own thread."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dpt_ray.training.prefetch import prefetch
from dpt_ray.training.workload import Worker
from tests.helpers.processes import kill_session, session_pids
from tests.helpers.small_training import SETTINGS, join_two, load, run, tiny

EVERY = replace(SETTINGS, checkpoint_every=1)


def noisy(batch, random):
    """Prepare a batch by random numbers of its positions and of torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.step)
        scale = torch.rand(())
    return {"x": batch["x"] + scale * random.normal("prepared", (6,))}


def dropping(model, batch, random):
    """A loss that draws from the global generator, as dropout does."""
    return (model(nn.functional.dropout(batch["x"], 0.3)) - batch["x"]).square().mean()


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("processes", [1, 3])
def test_processes_load_what_the_training_thread_prepares(processes):
    torch.manual_seed(0)
    expected, logged = run(step_fn=dropping, prepare=noisy)
    torch.manual_seed(0)
    found, record = run(step_fn=dropping, prepare=noisy, load_processes=processes)
    assert same(found.ema, expected.ema)
    assert record.logs == logged.logs


def test_a_training_with_processes_is_resumed_to_the_same_bits():
    expected, undisturbed = run(EVERY, prepare=noisy, load_processes=2)
    found, record = run(prepare=noisy, load_processes=2, resume=undisturbed.checkpoints[5])
    assert [log["step"] for log in record.logs] == [*range(6, 12)]
    assert same(found.ema, expected.ema)


def one_of_two(rank, folder):
    join_two(rank, folder)
    model = DistributedDataParallel(tiny())
    result, _ = run(model=model, worker=Worker(rank, 2), prepare=noisy, load_processes=2)
    if rank == 0:
        save_file(result.ema, f"{folder}/two.safetensors")
    distributed.destroy_process_group()


def test_two_workers_with_processes_train_as_one_without(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    expected, _ = run(prepare=noisy)
    for key, value in load_file(tmp_path / "two.safetensors").items():
        torch.testing.assert_close(value, expected.ema[key], rtol=0, atol=1e-6)


def test_batches_come_in_order_from_several_processes_that_end_with_the_training():
    def load(step):
        return {"step": torch.tensor(step), "pid": torch.tensor(os.getpid())}

    with closing(prefetch(load, range(5, 25), processes=2)) as batches:
        found = [batch for batch, _ in (next(batches) for _ in range(15))]
    assert [batch["step"].item() for batch in found] == [*range(5, 20)]
    assert len({batch["pid"].item() for batch in found} - {os.getpid()}) == 2
    assert not multiprocessing.active_children()


def test_an_error_in_a_process_reaches_the_training_as_it_was_raised():
    def torn(rows, step):
        if step == 5:
            raise OSError("shard is gone")
        return load(rows, step)

    with pytest.raises(OSError) as error:
        run(load_batch=torn, load_processes=2)
    assert str(error.value) == "shard is gone"
    assert "in torn" in error.value.__notes__[0]
    assert not multiprocessing.active_children()


def test_without_a_step_left_nothing_is_loaded():
    _, record = run(EVERY)
    for processes in (0, 2):
        result, _ = run(resume=record.checkpoints[SETTINGS.steps], load_batch=None, load_processes=processes)
        assert result.ema.keys() == tiny().state_dict().keys()


# Each process sets its seed before it looks who its parent is: these do so when that was killed.
STARTS_LATE = """
import os, time, torch
from dpt_ray.training.prefetch import prefetch
training, seed = os.getpid(), torch.manual_seed


def late(value):
    while os.getppid() == training:
        time.sleep(0.1)
    return seed(value)


torch.manual_seed = late
print("step", flush=True)
next(prefetch(lambda step: {}, range(10), processes=2))
"""

ENDLESS = """
import torch
from dpt_ray.training.prefetch import prefetch
for batch, _ in prefetch(lambda step: {"x": torch.zeros(1000)}, range(10**9), processes=2):
    print("step", flush=True)
"""


@pytest.mark.parametrize("script", [ENDLESS, STARTS_LATE], ids=["loading", "starting"])
def test_the_processes_of_a_training_that_was_killed_end_by_themselves(script):
    training = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert training.stdout.readline() == b"step\n"
        while len(processes := set(session_pids(training.pid)) - {training.pid}) < 2:
            time.sleep(0.1)
        training.send_signal(signal.SIGKILL)
        training.wait()
        end = time.monotonic() + 120
        while processes & set(session_pids(training.pid)):
            assert time.monotonic() < end, "processes go on after their training"
            time.sleep(0.2)
    finally:
        kill_session(training)
