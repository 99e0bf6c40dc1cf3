import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dpt_ray.training import loop
from dpt_ray.training.guards import NonFiniteLoss
from dpt_ray.training.loop import train
from dpt_ray.training.order import ShardWindows, batch_rows
from dpt_ray.training.workload import Hooks, Worker, Workload
from tests.helpers.small_training import ROWS, SETTINGS, Record, denoise, join_two, load, run, tiny


@pytest.fixture(scope="module")
def whole():
    """The run that never stops, with a checkpoint at every step."""
    return run(replace(SETTINGS, checkpoint_every=1))


@pytest.mark.parametrize("stop", [1, 2, 3, 7, 10])
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(whole, stop):
    expected, undisturbed = whole
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))  # other weights
    result, record = run(model=model, resume=undisturbed.checkpoints[stop])
    assert record.logs == undisturbed.logs[stop:]
    tensors, meta = record.checkpoints[SETTINGS.steps]
    last, last_meta = undisturbed.checkpoints[SETTINGS.steps]
    assert meta == last_meta and tensors.keys() == last.keys()
    assert all(torch.equal(tensors[key], last[key]) for key in last)
    assert all(torch.equal(result.ema[key], expected.ema[key]) for key in expected.ema)


def test_a_resumed_run_does_not_hold_the_checkpoint_that_it_came_from(whole):
    tensors, meta = whole[1].checkpoints[3]
    copied = {name: value.clone() for name, value in tensors.items()}
    watched = [weakref.ref(value) for value in copied.values()]
    given, held = [(copied, meta)], []
    del copied

    def step_fn(*arguments):
        held.append(sum(ref() is not None for ref in watched))
        return denoise(*arguments)

    hooks, work = Hooks(), Workload(tiny(), step_fn, load, ROWS)
    train(work, SETTINGS, Worker(), hooks, given.pop())
    assert set(held) == {0}


def test_resuming_a_finished_run_returns_its_average_without_a_step(whole):
    expected, undisturbed = whole
    loaded = []
    result, record = run(
        resume=undisturbed.checkpoints[SETTINGS.steps],
        load_batch=lambda rows, step: loaded.append(step),
    )
    assert not loaded
    assert not record.logs and not record.checkpoints
    assert all(torch.equal(result.ema[key], expected.ema[key]) for key in expected.ema)


def test_callbacks_come_at_their_steps_and_at_the_end():
    _, record = run(replace(SETTINGS, log_every=3))
    assert [r["step"] for r in record.logs] == [3, 6, 9, 11]
    assert list(record.checkpoints) == [4, 8, 11]


def test_the_averages_are_shown_at_their_steps(whole):
    seen = {}

    def watch(step, ema):
        seen[step] = {key: value.clone() for key, value in ema.items()}

    run(watching={"watch_every": 5, "on_watch": watch})
    assert list(seen) == [5, 10]
    for step, ema in seen.items():
        tensors = whole[1].checkpoints[step][0]
        assert all(torch.equal(value, tensors[f"ema.{key}"]) for key, value in ema.items())


def test_training_follows_plain_torch(whole):
    """The same run spelled out with an unfused AdamW, LambdaLR and clip_grad_norm_."""
    from dpt_ray.training.random import StepRandom

    model = tiny()
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.02, betas=(0.9, 0.99), weight_decay=0.03, foreach=False
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / 3 if s < 3 else (1 + math.cos(math.pi * (s - 3) / 8)) / 2
    )
    for step in range(11):
        rows = batch_rows(0, step, 32, ROWS)
        loss = denoise(model, load(rows, step), StepRandom(0, step, 0, 32))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        logged = whole[1].logs[step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert logged["lr"] == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        for key, value in model.state_dict().items():
            average[key] = 0.9 * average[key] + 0.1 * value
    for key, value in average.items():
        torch.testing.assert_close(whole[0].ema[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [4, 3])  # of the 4 groups of 8
def test_accumulated_parts_give_the_whole_batchs_training(parts, whole):
    result, record = run(gradient_accumulation=parts)
    for key, value in whole[0].ema.items():
        torch.testing.assert_close(result.ema[key], value, rtol=0, atol=1e-6)
    losses = [r["loss"] for r in record.logs]
    assert losses == pytest.approx([r["loss"] for r in whole[1].logs], rel=1e-5)


def infinite_on_second_half_of_step_5(model, batch, random):
    # The loss is infinite, its own gradient is not.
    bad = random.step == 5 and random.lo == 16
    return denoise(model, batch, random) + (math.inf if bad else 0.0)


def asks_at_the_sixth_step(rank):
    """Asks for a checkpoint, on the last of two workers only."""
    calls = []

    def asked():
        calls.append(None)
        return rank == 1 and len(calls) == 6

    return asked


def slow_run(step_seconds, model=None, save_seconds=0.0, log_every=20, resume=None, **more):
    """A run of 40 steps by a clock that only steps and checkpoints advance."""
    clock, record = [0.0], Record()
    keep_it = record.checkpoint

    def slow(model, batch, random):
        clock[0] += step_seconds(random.step) if callable(step_seconds) else step_seconds
        return denoise(model, batch, random)

    def checkpoint(*given):
        clock[0] += save_seconds
        keep_it(*given)

    record.checkpoint = checkpoint
    settings = replace(SETTINGS, steps=40, log_every=log_every, checkpoint_every=1000)
    with patch.object(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0])):
        return run(settings, slow, model, record=record, resume=resume, **more)


@pytest.mark.parametrize(
    ("step_seconds", "more", "expected"),
    [
        (0.5, {}, [40]),
        (13.0, {}, [9, 18, 27, 36, 40]),  # 9 steps take 117 s
        (13.0, {"log_every": 1}, [9, 18, 27, 36, 40]),
        (200.0, {"log_every": 7}, [*range(1, 41)]),
        # 15 s of saving are a twentieth of 300 s, in which there are 23 steps.
        (13.0, {"save_seconds": 15.0}, [9, 32, 40]),
        # Slower from step 21 on, which is seen at the log of step 25 (34 s a step on average).
        (lambda step: 1.0 if step < 20 else 34.0, {"log_every": 5}, [25, 28, 31, 34, 37, 40]),
    ],
)
def test_a_checkpoint_is_due_by_time_too(step_seconds, more, expected):
    _, record = slow_run(step_seconds, **more)
    assert list(record.checkpoints) == expected


def test_a_run_with_checkpoints_by_time_is_resumed_to_the_same_bits():
    expected, undisturbed = slow_run(13.0)
    result, record = slow_run(20.0, resume=undisturbed.checkpoints[18])
    assert list(record.checkpoints) == [24, 30, 36, 40]
    assert all(torch.equal(result.ema[key], expected.ema[key]) for key in expected.ema)


def test_rank_0s_clock_decides_for_all_workers_when_to_save(two_workers):
    assert [found["timed.seen"].tolist() for found in two_workers] == [[9, 18, 27, 36, 40]] * 2


def worker(rank: int, folder: str) -> None:
    """One of two processes that train in several ways; what came of them as a file."""
    join_two(rank, folder)
    found = {}
    for name, step_fn, accumulation, resume in (
        ("plain", denoise, 2, None),
        ("bad", infinite_on_second_half_of_step_5, 1, None),
        ("unequal", denoise, 1, None),  # 8 positions and 16
        ("resumed", denoise, 1, kept(folder, "one")),
    ):
        model = tiny()
        result, record = run(
            replace(SETTINGS, batch_size=24) if name == "unequal" else SETTINGS,
            step_fn=step_fn,
            model=DistributedDataParallel(model),
            worker=Worker(rank, 2),
            gradient_accumulation=accumulation,
            resume=resume,
            watching={"save_asked": asks_at_the_sixth_step(rank)} if name == "bad" else {},
        )
        losses = [r["loss"] for r in record.logs]
        saved = [step for step, (tensors, _) in record.checkpoints.items() if tensors]
        found |= {f"{name}.ema.{key}": value for key, value in result.ema.items()}
        found |= {f"{name}.model.{key}": value for key, value in model.state_dict().items()}
        found[f"{name}.losses"] = torch.tensor(losses, dtype=torch.float64)
        found[f"{name}.skipped"] = torch.tensor(result.skipped_steps)
        found[f"{name}.seen"] = torch.tensor(list(record.checkpoints))
        found[f"{name}.saved"] = torch.tensor(saved)
    # The second worker's clock runs ten times as fast.
    _, timed = slow_run(13.0 * (1 + 9 * rank), DistributedDataParallel(tiny()), worker=Worker(rank, 2))
    found["timed.seen"] = torch.tensor(list(timed.checkpoints))
    if rank == 0:
        keep(folder, "two", record.checkpoints[8])
    save_file(found, f"{folder}/{rank}.safetensors")
    distributed.destroy_process_group()


def keep(folder, name, checkpoint):
    save_file(checkpoint[0], f"{folder}/{name}.safetensors")
    Path(folder, f"{name}.json").write_text(json.dumps(checkpoint[1]))


def kept(folder, name):
    return load_file(f"{folder}/{name}.safetensors"), json.loads(Path(folder, f"{name}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, whole):
    """Where processes meet; it holds a checkpoint that one worker has made."""
    folder = tmp_path_factory.mktemp("ddp")
    keep(folder, "one", whole[1].checkpoints[4])
    return folder


@pytest.fixture(scope="module")
def two_workers(folder):
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_two_workers_train_as_one(whole, two_workers):
    first, second = two_workers
    for key, value in whole[0].ema.items():
        torch.testing.assert_close(first[f"plain.ema.{key}"], value, rtol=0, atol=1e-6)
        assert torch.equal(first[f"plain.model.{key}"], second[f"plain.model.{key}"])
    losses = torch.tensor([r["loss"] for r in whole[1].logs], dtype=torch.float64)
    torch.testing.assert_close(first["plain.losses"], losses, rtol=1e-5, atol=0)


def test_a_run_goes_on_with_another_number_of_workers(whole, folder, two_workers):
    expected = [r["loss"] for r in whole[1].logs]
    assert two_workers[0]["resumed.losses"].tolist() == pytest.approx(expected[4:], rel=1e-5)
    _, record = run(resume=kept(folder, "two"))
    assert [r["loss"] for r in record.logs] == pytest.approx(expected[8:], rel=1e-5)


def test_workers_with_unequal_shares_train_as_one(two_workers):
    expected, record = run(replace(SETTINGS, batch_size=24))
    for key, value in expected.ema.items():
        torch.testing.assert_close(two_workers[0][f"unequal.ema.{key}"], value, rtol=0, atol=1e-6)
        assert torch.equal(two_workers[0][f"unequal.model.{key}"], two_workers[1][f"unequal.model.{key}"])
    losses = [r["loss"] for r in record.logs]
    assert two_workers[0]["unequal.losses"].tolist() == pytest.approx(losses, rel=1e-5)


def test_where_one_worker_asks_all_come_to_a_checkpoint(two_workers):
    for worker_ in two_workers:
        assert worker_["bad.seen"].tolist() == [4, 6, 8, 11]


def test_all_workers_come_to_a_checkpoint_but_only_the_first_logs_and_holds_it(two_workers):
    first, second = two_workers
    for worker_ in two_workers:
        assert worker_["plain.seen"].tolist() == [4, 8, 11]
    assert first["plain.saved"].tolist() == [4, 8, 11]
    assert len(second["plain.saved"]) == 0 and len(second["plain.losses"]) == 0
    assert not [key for key in second if key.startswith("plain.ema.")]


def test_a_bad_loss_on_one_worker_makes_all_skip_the_step(two_workers):
    first, second = two_workers
    assert first["bad.skipped"] == second["bad.skipped"] == 1
    for key in (k for k in first if k.startswith("bad.model.")):
        assert torch.equal(first[key], second[key]) and first[key].isfinite().all()


def bad_at(*steps, poison):
    def step_fn(model, batch, random):
        loss = denoise(model, batch, random)
        return poison(loss) if random.step in steps else loss

    return step_fn


@pytest.mark.parametrize(
    "poison",
    [
        lambda loss: loss * math.nan,
        lambda loss: loss + math.inf,
        lambda loss: loss + 0 * (loss - loss.detach()).sqrt(),  # finite loss, NaN gradient
    ],
)
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(poison):
    settings = replace(SETTINGS, checkpoint_every=1)
    result, record = run(settings, bad_at(4, 6, 7, poison=poison))
    assert result.skipped_steps == 3
    before, after = record.checkpoints[4][0], record.checkpoints[5][0]
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("ema."))
    assert record.checkpoints[11][0]["optimizer.step.0.weight"] == 11 - 3
    assert all(v.isfinite().all() for v in result.ema.values())
    assert [meta["bad_in_a_row"] for _, meta in record.checkpoints.values()][3:9] == [*(0, 1, 0, 1, 2, 0)]


@pytest.mark.parametrize("every", [1, 100])
def test_too_many_bad_steps_in_a_row_stop_the_run_naming_the_step(every):
    settings = replace(SETTINGS, log_every=every, checkpoint_every=every)
    step_fn = bad_at(1, 3, 4, 5, poison=lambda loss: loss * math.nan)
    with pytest.raises(NonFiniteLoss, match="at step 6, the last of 3 in a row") as error:
        run(settings, step_fn)
    assert error.value.step == 6


def test_a_resumed_run_remembers_the_bad_steps_before_it():
    step_fn = bad_at(3, 4, 5, poison=lambda loss: loss * math.nan)
    record = Record()
    with pytest.raises(NonFiniteLoss):
        run(replace(SETTINGS, checkpoint_every=1), step_fn, record=record)
    with pytest.raises(NonFiniteLoss, match="at step 6"):
        run(step_fn=step_fn, resume=record.checkpoints[5])


def test_an_error_while_loading_data_ends_the_run_with_that_error():
    def torn(rows, step):
        if step == 5:
            raise OSError("shard is gone")
        return load(rows, step)

    with pytest.raises(OSError, match="shard is gone"):
        run(load_batch=torn)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_any_number_of_workers_share_the_batches_of_a_shuffle_in_windows(workers, monkeypatch):
    monkeypatch.setattr(loop, "_over_workers", lambda *_: (0.0, False, 99))  # they are not all here
    shards = [10, 5, 15, 10, 10]
    seen = {step: [] for step in range(SETTINGS.steps)}

    def noted(rows, step):
        seen[step].append(rows)
        return load(rows, step)

    for rank in range(workers):
        order = ShardWindows(0, SETTINGS.batch_size, shards, 2)
        run(load_batch=noted, worker=Worker(rank, workers), order=order)
    expected = ShardWindows(0, SETTINGS.batch_size, shards, 2)
    for step, parts in seen.items():
        assert np.concatenate(parts).tolist() == expected(step).tolist()


def test_a_batch_with_too_few_groups_for_the_workers_is_refused():
    with pytest.raises(ValueError, match="batch_size 32 must be a multiple of 8 and at least 48"):
        run(worker=Worker(world_size=3), gradient_accumulation=2)


def test_bfloat16_computes_in_bfloat16_but_keeps_float32_weights():
    seen = []

    def step_fn(model, batch, random):
        seen.append(model(batch["x"]).dtype)
        return denoise(model, batch, random)

    result, _ = run(replace(SETTINGS, precision="bfloat16", steps=2), step_fn)
    assert set(seen) == {torch.bfloat16}
    assert {v.dtype for v in result.ema.values()} == {torch.float32}
