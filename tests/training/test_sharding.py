"""Two workers that share one copy of a small U-ViT, beside two that have a copy each."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dpt_ray.models.uvit import UViT, UViTConfig
from dpt_ray.training.ema import EMA
from dpt_ray.training.guards import NonFiniteLoss
from dpt_ray.training.loop import TrainSettings, train
from dpt_ray.training.optimizer import ParameterGroup, adamw
from dpt_ray.training.sharding import local, shard
from dpt_ray.training.workload import Hooks, Worker, Workload
from tests.helpers.small_training import join_two

ROWS, STOP, STEPS = 48, 4, 9
DATA = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))
# 3 classes and null: 4 rows to share; a position embedding of one row, which only one of two can have.
CONFIG = UViTConfig(8, 2, 1, dim=16, depth=2, heads=2, num_classes=3)
SETTINGS = TrainSettings(
    steps=STEPS,
    batch_size=32,
    learning_rate=0.01,
    ema_decay=0.9,
    grad_clip=0.5,
    log_every=1,
    checkpoint_every=STOP,
    max_bad_steps=2,
)


def network(kind: str, seed: int = 1):
    torch.manual_seed(seed)
    model = UViT(CONFIG)
    model.gradient_checkpointing = "recomputed" in kind
    if "fsdp" in kind:
        shard(model, model.blocks, "cpu")
    return DistributedDataParallel(model) if "ddp" in kind else model


def denoise(model, batch, random):
    noise = random.normal("noise", batch["x"].shape[1:])
    labels = random.integers("label", 4)
    predicted = model(batch["x"] + noise, 1000 * random.uniform("time"), labels)
    return (predicted.float() - noise).square().mean()


def bad_on_one_worker_at(*steps):
    """The loss is infinite for the second half of the batch, its own gradient is not."""

    def step_fn(model, batch, random):
        bad = random.step in steps and random.lo >= 16
        return denoise(model, batch, random) + (math.inf if bad else 0.0)

    return step_fn


def groups() -> list[ParameterGroup]:
    """Vectors without decay and at another rate than the rest."""
    shapes = {name: p.ndim for name, p in UViT(CONFIG).named_parameters()}
    matrices, vectors = ([name for name, n in shapes.items() if (n > 1) == is_it] for is_it in (True, False))
    return [ParameterGroup(matrices, 0.5, 0.3), ParameterGroup(vectors, 1.0, 0.0)]


class Runs:
    """Trainings of one of two workers; what each comes to is in files of the folder."""

    def __init__(self, folder: str, rank: int = 0, workers: int = 1) -> None:
        self.folder, self.worker, self.rank = Path(folder), Worker(rank, workers), rank

    def __call__(
        self,
        name,
        kind,
        step_fn=denoise,
        resume=None,
        model=None,
        parts=2,
        parameter_groups=None,
        **settings,
    ):
        """Trains; the losses, and both the checkpoints and the averages shown at the same steps."""
        losses = []

        def checkpoint(step, tensors, meta):
            assert (tensors is not None) == (self.rank == 0)
            if tensors:
                counts = torch.tensor([meta[key] for key in ("step", "skipped_steps", "bad_in_a_row")])
                save_file(tensors | {"meta": counts}, self.folder / f"{name}.{step}")

        def watch(step, averages):
            save_file(dict(averages), self.folder / f"{name}.{step}.seen")

        hooks = Hooks(
            on_log=lambda record: losses.append([record["loss"], record["grad_norm"]]),
            on_checkpoint=checkpoint,
            watch_every=STOP,
            on_watch=watch,
        )
        model = model or network(kind)
        work = Workload(model, step_fn, lambda rows, step: {"x": DATA[rows]}, ROWS)
        result = train(
            replace(work, gradient_accumulation=parts, parameter_groups=parameter_groups),
            replace(SETTINGS, **settings),
            self.worker,
            hooks,
            resume and self.checkpoint(*resume),
        )
        assert bool(result.ema) == (self.rank == 0)
        if self.rank == 0:
            curves = {"losses": torch.tensor(losses, dtype=torch.float64)}
            save_file(result.ema | curves, self.folder / f"{name}.result")

    def checkpoint(self, name, step):
        if distributed.is_initialized():
            distributed.barrier()  # rank 0 has written it
        tensors = load_file(self.folder / f"{name}.{step}")
        counts = tensors.pop("meta").tolist()
        return tensors, dict(zip(("step", "skipped_steps", "bad_in_a_row"), counts, strict=True))


def worker(rank: int, folder: str) -> None:
    join_two(rank, folder)
    run = Runs(folder, rank, 2)
    run("ddp", "ddp")
    run("fsdp", "fsdp")
    run("fsdp-recomputed", "fsdp recomputed")
    run("fsdp-from-fsdp", "fsdp", resume=("fsdp", STOP), model=network("fsdp", seed=2))
    run("fsdp-from-ddp", "fsdp", resume=("ddp", STOP))
    run("ddp-from-fsdp", "ddp", resume=("fsdp", STOP))
    run("ddp-bf16", "ddp", precision="bfloat16")
    run("fsdp-bf16", "fsdp", precision="bfloat16")
    for kind in ("ddp", "fsdp"):
        run(f"{kind}-groups", kind, parameter_groups=groups())
    run("fsdp-groups-resumed", "fsdp", resume=("fsdp-groups", STOP), parameter_groups=groups())
    run("skipping", "fsdp", bad_on_one_worker_at(5), checkpoint_every=1, parts=1)

    # A rollback, as the stage makes one: the same model goes on from the checkpoint before the bad steps.
    model = network("fsdp")
    with contextlib.suppress(NonFiniteLoss):
        run("rolled-back", "", bad_on_one_worker_at(6, 7), model=model)
        raise AssertionError("two bad steps in a row were let through")
    run("rolled-back", "", resume=("rolled-back", STOP), model=model)

    torch.save(held(network("fsdp")), f"{folder}/held.{rank}")
    distributed.destroy_process_group()


def held(model) -> dict[str, int]:
    """The bytes of the parts of a training that this worker has."""
    optimizer, ema = adamw(model, 0.1, 0.0, (0.9, 0.99)), EMA(model, 0.9)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {"weights": model.parameters(), "averages": ema.tensors.values(), "moments": moments}
    return {name: sum(local(value).nbytes for value in values) for name, values in tensors.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    one = Runs(str(folder))
    one("one", "")
    one("one-from-fsdp", "", resume=("fsdp", STOP))
    one("one-groups", "", parameter_groups=groups())
    return folder


def result(runs, name):
    found = load_file(runs / f"{name}.result")
    return found.pop("losses"), found


def same_tensors(runs, *names):
    first, second = (load_file(runs / name) for name in names)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("fsdp", "ddp", 1e-5),
        ("fsdp", "one", 1e-5),
        ("fsdp-recomputed", "fsdp", 0.0),
        ("fsdp-from-ddp", "ddp", 1e-5),
        ("ddp-from-fsdp", "fsdp", 1e-5),
        ("one-from-fsdp", "fsdp", 1e-5),
        ("fsdp-bf16", "ddp-bf16", 1e-3),
        ("fsdp-groups", "ddp-groups", 1e-5),
        ("fsdp-groups", "one-groups", 1e-5),
    ],
)
def test_shards_train_as_replicas_do_and_go_on_from_each_others_checkpoints(runs, name, other, tolerance):
    (losses, averages), (expected, other_averages) = (result(runs, run) for run in (name, other))
    torch.testing.assert_close(losses, expected[-len(losses) :], rtol=tolerance, atol=0)
    for key, value in other_averages.items():
        torch.testing.assert_close(averages[key], value, rtol=0, atol=10 * tolerance)


def test_a_resumed_sharded_run_is_bit_identical_to_one_that_never_stopped(runs):
    for resumed, whole in (("fsdp-from-fsdp", "fsdp"), ("fsdp-groups-resumed", "fsdp-groups")):
        losses, expected = result(runs, resumed)[0], result(runs, whole)[0]
        assert torch.equal(losses, expected[STOP:])
        assert same_tensors(runs, f"{resumed}.{STEPS}", f"{whole}.{STEPS}")
    assert not same_tensors(runs, f"fsdp-groups.{STEPS}", f"fsdp.{STEPS}")


def test_a_checkpoint_of_shards_is_one_of_replicas_by_names_and_shapes(runs):
    shards, replicas = (load_file(runs / f"{name}.{STEPS}") for name in ("fsdp", "ddp"))
    assert {key: (v.shape, v.dtype) for key, v in shards.items()} == {
        key: (v.shape, v.dtype) for key, v in replicas.items()
    }


def test_the_averages_shown_while_training_are_whole(runs):
    tensors = load_file(runs / f"fsdp.{STOP}")
    for key, value in load_file(runs / f"fsdp.{STOP}.seen").items():
        assert torch.equal(value, tensors[f"ema.{key}"])


def test_a_bad_loss_on_one_worker_changes_no_shard(runs):
    before, after = (load_file(runs / f"skipping.{step}") for step in (5, 6))
    assert after.pop("meta").tolist() == [6, 1, 1] and before.pop("meta").tolist() == [5, 0, 0]
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("ema."))
    last = load_file(runs / f"skipping.{STEPS}")
    assert last["meta"].tolist() == [STEPS, 1, 0] and last["optimizer.step.norm.weight"] == STEPS - 1
    assert all(value.isfinite().all() for value in last.values())


def test_a_sharded_model_goes_back_to_a_checkpoint(runs):
    assert same_tensors(runs, f"rolled-back.{STEPS}", f"fsdp.{STEPS}")


def test_each_of_two_workers_holds_half(runs):
    parts = [torch.load(runs / f"held.{rank}", weights_only=True) for rank in (0, 1)]
    for name, all_of_it in held(UViT(CONFIG)).items():
        steps = 4 * len(list(UViT(CONFIG).parameters())) if name == "moments" else 0  # a count for each
        assert sum(part[name] - steps for part in parts) == all_of_it - steps
        assert all(0.45 < (part[name] - steps) / (all_of_it - steps) < 0.55 for part in parts)
