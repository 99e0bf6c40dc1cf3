"""The denoiser's training in this process, on a handful of hand-made latents: guards and bad input."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dpt_ray.artifacts import Store
from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.shards import write_moments
from dpt_ray.stages import train_diffusion
from dpt_ray.stages.execute import StageError
from dpt_ray.stages.graph import flow
from dpt_ray.stages.node import Task
from dpt_ray.stages.watching import read_log

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
ROWS, CLASSES = 40, 4
SMALL = (
    "data.image_size=4",
    "diffusion.model={patch_size: 2, dim: 16, depth: 2, heads: 2, modulation: true}",
    "diffusion.steps=12",
    "diffusion.batch_size=16",
    "diffusion.checkpoint_every=4",
    "diffusion.log_every=2",
    "compute.train_workers=0",
)


@dataclass(frozen=True)
class Latents:
    """A store in which all that a denoiser is trained on is published."""

    store: Store

    def task(self, *overrides: str) -> Task:
        config = load_config(DIGITS, [*SMALL, *overrides])
        node = flow(config)["denoiser"]
        inputs = {key: self.store.artifact(key, "made-by-hand") for key in node.inputs}
        return Task(node, node.artifact(self.store), inputs, config.compute, "")

    def make(self, *overrides: str) -> Task:
        """Trains, and publishes as a run does."""
        task = self.task(*overrides)
        facts = train_diffusion.make(task)
        references = {key: f"{source.stage}/{source.reference}" for key, source in task.node.inputs.items()}
        about = {"settings": dict(task.node.settings), "inputs": references, "version": task.node.version}
        task.out.publish(facts | about)
        return task

    def label(self, values: list[int], ids: list[str] | None = None) -> None:
        """Publishes pseudo-labels; the confidence falls from 1 by 1/100 a row."""
        ids = ids or [f"image-{row}" for row in range(len(values))]
        confidence = pa.array(1 - np.arange(len(values)) / 100, pa.float32())
        table = pa.table({"id": ids, "label": pa.array(values, pa.int32()), "confidence": confidence})
        out = self.store.artifact("labels", "made-by-hand")
        out.publish_files(lambda folder: pq.write_table(table, folder / "pseudo_labels.parquet"))


@pytest.fixture
def latents(tmp_path):
    torch.set_num_threads(1)
    made = Latents(Store(str(tmp_path)))
    index, moments, autoencoder = (
        made.store.artifact(name, "made-by-hand") for name in ("index", "moments", "autoencoder")
    )
    index.write_json("classes.json", [f"class-{k}" for k in range(CLASSES)])
    index.publish({"classes": CLASSES})
    autoencoder.publish_files(lambda folder: _identity(folder))
    autoencoder.publish({"latent_shape": [1, 4, 4], "scale": 1.0})
    values = np.random.default_rng(0).normal(size=(ROWS, 1, 2, 4, 4)).astype(np.float16)
    values[:, :, 1] = -30
    ids = [f"image-{row}" for row in range(ROWS)]
    shard = moments.publish_shard("a", ".arrow", ROWS, lambda path: write_moments(path, ids, values))
    moments.publish({"shape": [1, 2, 4, 4], "shards": [shard]})
    made.label([row % CLASSES for row in range(ROWS)])
    return made


def _identity(folder: Path) -> None:
    from dpt_ray.models.autoencoder import open_autoencoder

    open_autoencoder("identity", None, channels=1, size=4).save(folder)


def weights(task):
    return load_file(task.out.path("model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the moments of steps chosen by `bad(step, attempt)` not a number; counts the attempts at each."""
    attempts = {}

    def poison(bad):
        from dpt_ray.training import loop

        original = loop.prefetch

        def poisoning(load, steps):
            def loaded(step):
                attempts[step] = attempts.get(step, 0) + 1
                batch = load(step)
                return batch | {"moments": batch["moments"] * np.nan} if bad(step, attempts[step]) else batch

            return original(loaded, steps)

        monkeypatch.setattr(loop, "prefetch", poisoning)
        return attempts

    return poison


def test_a_loss_that_stays_not_finite_is_rolled_back_once_and_then_stops_the_stage(latents, poisoned):
    attempts = poisoned(lambda step, attempt: step >= 6)
    task = latents.task("diffusion.steps=30", "diffusion.checkpoint_every=2")
    with pytest.raises(StageError, match=r"not finite at step 16, the last of 10 in a row, after a rollback"):
        train_diffusion.make(task)
    assert attempts[5] == 1 and attempts[6] == attempts[15] == 2  # back to the last step that was good
    assert task.out.read_json("rollback.json") == {"from": 16, "to": 6}
    assert not task.out.exists("model.safetensors")
    with pytest.raises(StageError, match="after a rollback"):  # the one rollback stays spent
        train_diffusion.make(task)
    assert attempts[6] == 3


def test_a_rollback_that_helps_gives_the_undisturbed_weights_and_is_in_the_log(latents, poisoned):
    expected = latents.make("diffusion.steps=20")
    log, whole = read_log(expected.out), weights(expected)
    expected.out.fs.rm(expected.out.path(""), recursive=True)

    poisoned(lambda step, attempt: 5 <= step < 15 and attempt == 1)
    task = latents.make("diffusion.steps=20")
    assert same(weights(task), whole)
    again = read_log(task.out)
    assert [record["loss"] for record in again] == [record["loss"] for record in log]
    assert {r["step"]: r["rolled_back_from"] for r in again if "rolled_back_from" in r} == {6: 15}


def test_a_loss_not_finite_before_the_first_checkpoint_stops_the_stage(latents):
    with pytest.raises(StageError, match="before the first checkpoint: lower learning_rate") as error:
        latents.make(
            "diffusion.learning_rate=1e30", "diffusion.warmup_steps=0", "diffusion.checkpoint_every=99"
        )
    assert "\n" not in str(error.value)


def test_a_gpu_that_is_too_small_is_told_in_one_line_naming_what_to_set(latents, monkeypatch):
    def full(*arguments, **more):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("dpt_ray.training.loop.train", full)
    with pytest.raises(StageError) as error:
        latents.make()
    for word in ("compute.gradient_accumulation", "diffusion.batch_size", "Tried to allocate 2 GiB"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_refused_naming_the_keys(latents):
    other = latents.make("diffusion.model.dim=32")
    task = latents.task()
    task.out.fs.copy(other.out.path("checkpoints"), task.out.path("checkpoints"), recursive=True)
    with pytest.raises(StageError, match=r"checkpoint does not fit this model: .*differing: ema\.") as error:
        train_diffusion.make(task)
    assert "\n" not in str(error.value)


def test_an_image_without_a_label_is_named_before_training(latents):
    latents.label([row % CLASSES for row in range(ROWS - 2)])
    task = latents.task()
    with pytest.raises(ConfigError, match="2 images have no label, the first is image-38"):
        train_diffusion.make(task)
    assert not task.out.exists("started.json")


def test_a_class_without_images_is_named_before_training(latents):
    latents.label([row % (CLASSES - 1) for row in range(ROWS)])
    task = latents.task()
    with pytest.raises(ConfigError, match="no training image has the pseudo-label class-3"):
        train_diffusion.make(task)
    assert not task.out.exists("started.json")


def test_tensorboard_shows_the_curves_of_the_log_and_a_resumed_training_doubles_none(latents, poisoned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    poisoned(lambda step, attempt: 5 <= step < 15 and attempt == 1)  # a rollback: records are cut
    task = latents.make("diffusion.steps=20")
    log = read_log(task.out)
    events = EventAccumulator(task.out.path("tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert [step for step, _ in curve] == [record["step"] for record in log] == list(range(2, 21, 2))
    assert [value for _, value in curve] == pytest.approx([record["loss"] for record in log])


def test_mfu_is_the_counted_flops_over_the_measured_peak(latents, monkeypatch):
    monkeypatch.setattr("dpt_ray.training.throughput.matmul_peak", lambda device, dtype: 1e9)
    task = latents.make()
    # By hand, multiply-adds of one forward pass: 4 patches and 2 tokens of 16 numbers, 3 blocks.
    tokens, dim, patch = 6, 16, 4
    block = tokens * (3 * dim**2 + dim**2 + 8 * dim**2) + 2 * tokens**2 * dim + 6 * dim**2
    other = tokens * 2 * dim**2 + 2 * 4 * patch * dim + 3 * 3 * 16 + 2 * dim**2 + 2 * dim**2
    forward = 2 * (3 * block + other)
    for record in read_log(task.out):
        assert record["mfu"] == pytest.approx(3 * forward * record["images_per_s"] / 1e9)
    assert task.out.read_json("started.json")["matmul_flops_per_s"] == 1e9
