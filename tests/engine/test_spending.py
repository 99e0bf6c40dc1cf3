"""What a run spends of GPUs, and where its cap ends it."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from dpt_ray.cluster.trials import run_trials
from dpt_ray.config import ConfigError, load_config
from dpt_ray.config.sections import Compute
from dpt_ray.engine.allowance import Allowance
from dpt_ray.engine.errors import StageError
from dpt_ray.engine.execute import execute
from dpt_ray.engine.node import RunsOn
from dpt_ray.engine.spending import Spending, attempts, gpus_of, hours
from dpt_ray.stages.denoiser import Denoiser
from dpt_ray.store.artifact import Store
from dpt_ray.store.checkpoints import checkpoint_names
from dpt_ray.training.log import read_log
from tests.helpers.latents import make_latents, same, weights
from tests.helpers.paths import DIGITS
from tests.helpers.runs import quiet
from tests.helpers.toy import toy_node

TWO_GPUS = Compute(actors=4, actor_gpus=0.5)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def make(store):
    """Executes a node on actors, made by `work(task)`; the node."""

    def execute_one(work, compute=TWO_GPUS, name="toy"):
        node = toy_node(name)
        node.stage.runs_on = RunsOn.ACTORS
        node.stage.make = classmethod(lambda stage, task: work(task) or {})
        spending = Spending(store.run_folder("run"), compute)
        execute([node], store, compute, quiet(), {}, spending=spending)
        return node

    return execute_one


def spend(store, hours_spent, made=("toy/0",)):
    """Record an attempt of before."""
    folder = store.run_folder("run")
    record = {"step": "toy", "made": [*made], "started": "2026-01-01", "gpus": 2.0}
    folder.write_json("spent/before.json", record | {"seconds": hours_spent * 1800})


@pytest.mark.parametrize(
    ("runs_on", "compute", "gpus"),
    [
        (RunsOn.ACTORS, TWO_GPUS, 2),
        (RunsOn.WORKERS, TWO_GPUS, 0),
        (RunsOn.WORKERS, Compute(train_gpus=True, train_workers=8), 8),
        (RunsOn.WORKERS, Compute(train_gpus=True, train_workers=0), 1),  # in the driver
        (RunsOn.WORKERS, Compute(actor_gpus=1, train_workers=0), 0),
        (RunsOn.FIT, TWO_GPUS, 0.5),
        (RunsOn.TRIALS, Compute(actor_gpus=0.5, concurrent_trials=3), 1.5),
        (RunsOn.DRIVER, TWO_GPUS, 0),
    ],
)
def test_a_stage_counts_with_the_gpus_that_it_asks_for(runs_on, compute, gpus):
    node = toy_node("toy")
    node.stage.runs_on = runs_on
    assert gpus_of(node.stage, compute) == gpus


def test_a_training_in_the_driver_counts_the_gpu_that_it_finds_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    node = toy_node("toy")
    node.stage.runs_on = RunsOn.WORKERS
    assert gpus_of(node.stage, Compute(actor_gpus=1, train_workers=0)) == 1
    assert gpus_of(node.stage, Compute(actor_gpus=1, train_workers=2)) == 0


def test_what_a_stage_spent_is_in_its_manifest_and_in_the_record_of_the_run(make, store):
    node = make(lambda task: time.sleep(0.5))
    (attempt,) = attempts(store.run_folder("run"))
    assert attempt["made"] == [f"toy/{node.digest}"] and attempt["gpus"] == 2
    assert attempt["seconds"] >= 0.5
    assert node.artifact(store).manifest["gpu_hours"] == pytest.approx(hours(attempt), abs=1e-4)


def test_a_failed_attempt_counts_too(make, store):
    def fail(task):
        time.sleep(0.2)
        raise ValueError("no")

    with pytest.raises(StageError):
        make(fail)
    node = make(lambda task: time.sleep(0.2))
    assert len(attempts(store.run_folder("run"))) == 2
    whole = sum(map(hours, attempts(store.run_folder("run"))))
    assert node.artifact(store).manifest["gpu_hours"] == pytest.approx(whole, abs=1e-4)


def test_what_runs_without_a_gpu_is_not_recorded(make, store):
    node = make(lambda task: None, Compute())
    assert attempts(store.run_folder("run")) == [] and "gpu_hours" not in node.artifact(store).manifest


def test_a_stage_does_not_start_once_the_cap_is_spent(make, store):
    spend(store, 3)
    with pytest.raises(StageError, match=r"^toy: this run has spent 3\.00 GPU hours, .* allows 3; raise it"):
        make(lambda task: pytest.fail("started"), TWO_GPUS.model_copy(update={"max_gpu_hours": 3.0}))
    make(lambda task: None, TWO_GPUS.model_copy(update={"max_gpu_hours": 3.1}))


def test_a_stage_ends_at_its_next_progress_once_the_cap_is_spent(make, store):
    spend(store, 3)
    seen = []

    def work(task):
        for done in range(100):
            task.progress(done, 100)
            seen.append(done)
            time.sleep(0.1)

    cap = 3 + 2 * 0.35 / 3600  # 0.35 s of two GPUs
    with pytest.raises(StageError, match=r"^toy: compute.max_gpu_hours \(3\.0.*\) is spent; .* raise it"):
        make(work, TWO_GPUS.model_copy(update={"max_gpu_hours": cap}))
    assert 1 <= len(seen) < 100


def test_what_is_left_of_the_cap_is_spent_by_all_gpus_at_once(store):
    spend(store, 3)
    compute = TWO_GPUS.model_copy(update={"max_gpu_hours": 3.5})
    node = toy_node("toy")
    node.stage.runs_on = RunsOn.ACTORS
    with Spending(store.run_folder("run"), compute).counting("toy", node.stage, ["toy/1"]) as allowance:
        left = allowance.until - time.monotonic()
    assert left == pytest.approx(0.5 * 3600 / 2, abs=5)


def test_the_last_progress_of_a_stage_never_ends_it():
    Allowance(0.0, "spent").checking(lambda *progress: None)(5, 5)


def test_a_training_over_its_allowance_stops_at_a_checkpoint_and_goes_on_to_the_same_weights(tmp_path):
    expected = weights(make_latents(tmp_path / "undisturbed").make())
    task = make_latents(tmp_path / "stopped").task()
    over = replace(task, allowance=Allowance(time.monotonic(), "spent"))
    with pytest.raises(StageError, match=r"^spent$"):
        Denoiser.make(over)
    assert [record["step"] for record in read_log(task.out)] == [2]  # of 12: the first one that is logged
    Denoiser.make(task)
    assert same(weights(task), expected)


def test_workers_of_a_training_stop_together(tmp_path, cluster):
    two = ("compute.train_workers=2", "diffusion.checkpoint_every=100")
    expected = weights(make_latents(tmp_path / "undisturbed").make(*two))
    task = make_latents(tmp_path / "stopped").task(*two)
    with pytest.raises(StageError, match=r"^spent$"):
        Denoiser.make(replace(task, allowance=Allowance(time.monotonic(), "spent")))
    assert [record["step"] for record in read_log(task.out)] == [2] and len(checkpoint_names(task.out)) == 1
    Denoiser.make(task)
    assert same(weights(task), expected)


def test_a_cap_without_gpus_is_refused():
    with pytest.raises(ConfigError, match="max_gpu_hours 5 limits nothing without GPUs: set actor_gpus or"):
        load_config(DIGITS, ["compute.max_gpu_hours=5"])


def test_a_sweep_over_its_allowance_ends_before_all_trials_and_goes_on_with_the_others(tmp_path, cluster):
    task = make_latents(tmp_path).task()
    out = task.out

    def run_trial(number, threads):
        out.publish_shard(f"trial-{number}", ".txt", 1, lambda path: path.write_text(str(number)))
        return {"validation_top1": 0.5}

    over = replace(task, allowance=Allowance(time.monotonic(), "spent"))
    with pytest.raises(StageError, match=r"^spent$"):
        run_trials(over, range(12), run_trial, 12, 0)
    made = out.shards().keys()
    assert len(made) < 12
    missing = [number for number in range(12) if f"trial-{number}" not in made]
    run_trials(task, missing, run_trial, 12, 0)
    assert len(out.shards()) == 12


def test_a_trial_that_loses_its_process_is_run_again_and_one_that_fails_is_not(tmp_path, cluster):
    task = make_latents(tmp_path).task()
    out = task.out

    def run_trial(number, threads):
        tried = tmp_path / f"tried-{number}-{time.time_ns()}"
        tried.touch()
        if number == 1 and len(list(tmp_path.glob("tried-1-*"))) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            raise ValueError("no such trial")
        out.publish_shard(f"trial-{number}", ".txt", 1, lambda path: path.write_text(str(number)))
        return {"validation_top1": 0.5}

    run_trials(task, range(4), run_trial, 4, 0)
    assert sorted(out.shards()) == [f"trial-{number}" for number in range(4)]
    assert [len(list(tmp_path.glob(f"tried-{number}-*"))) for number in (0, 1)] == [1, 3]
    with pytest.raises(RuntimeError, match="1 trials failed"):
        run_trials(task, [5], run_trial, 5, 0)
    assert len(list(tmp_path.glob("tried-5-*"))) == 1
