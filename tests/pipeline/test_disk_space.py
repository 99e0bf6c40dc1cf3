"""A disk that is too small is told before a stage starts, and one that fills up in one line."""

import subprocess
import sys
import textwrap
from collections import namedtuple

import pytest
from safetensors import SafetensorError

from dpt_ray.config import load_config
from dpt_ray.engine.execute import StageError
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run import _bytes_to_write
from dpt_ray.stages.denoiser import Denoiser
from dpt_ray.store.artifact import Store
from tests.helpers.latents import make_latents
from tests.helpers.runs import make

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that every disk has free."""
    return lambda number: monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(10**15, 0, number))


def checkpoint_bytes(task):
    """The tensors of a checkpoint: its JSON header is a few kilobytes."""
    from safetensors.torch import load_file

    [*_, last] = sorted(task.out.fs.glob(task.out.path("checkpoints/*.safetensors")))
    return sum(tensor.nbytes for tensor in load_file(last).values())


def test_a_training_without_room_for_three_checkpoints_stops_before_its_first_step(tmp_path, free):
    latents = make_latents(tmp_path)
    size = checkpoint_bytes(latents.make("diffusion.steps=4"))
    task = latents.task("diffusion.steps=4", "diffusion.seed=1")
    free(int(2.9 * size))
    with pytest.raises(StageError, match=rf"^{task.out.uri}: about 0.0 GB will be written.* set output"):
        Denoiser.make(task)
    assert not task.out.exists("log.jsonl")
    free(int(3.1 * size))
    Denoiser.make(task)


def test_checkpoints_that_are_there_already_need_no_more_room(tmp_path, free):
    latents = make_latents(tmp_path)
    size = checkpoint_bytes(latents.make("diffusion.steps=8"))  # two are kept
    free(int(1.1 * size))
    Denoiser.make(latents.task("diffusion.steps=8"))


def test_a_disk_that_fills_up_ends_a_training_with_one_line_naming_the_folder(tmp_path, monkeypatch):
    task = make_latents(tmp_path).task()

    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        StageError, match=rf"^{task.out.uri}/checkpoints: the disk is full \(.* GB free"
    ) as error:
        Denoiser.make(task)
    assert "\n" not in str(error.value)
    assert task.out.exists("stopped.json")  # it is not tried again by other workers


# On a disk of 2 MB: a checkpoint that fits, then one that does not.
FILLS_UP = """
    import os, sys, torch
    from dpt_ray.store.artifact import Artifact
    from dpt_ray.store.checkpoints import checkpoint_names, save_checkpoint

    out = Artifact(sys.argv[1])
    save_checkpoint(out, 1, {"w": torch.zeros(250_000)}, {"step": 1})
    for write in (
        lambda: save_checkpoint(out, 2, {"w": torch.zeros(500_000)}, {"step": 2}),
        lambda: out.write_bytes("samples.bin", bytes(2_000_000)),
    ):
        try:
            write()
        except ValueError as error:
            print(error)
    print(checkpoint_names(out), sorted(os.listdir(out.path(""))), len(os.listdir(out.path("checkpoints"))))
"""


def test_a_full_disk_is_told_with_its_folder_and_keeps_what_was_published(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=2m none {small}"
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*private, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user cannot mount a small disk")
    child = [
        *private,
        f'{mount} && exec "$@"',
        "sh",
        sys.executable,
        "-c",
        textwrap.dedent(FILLS_UP),
        str(small),
    ]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120)
    checkpoint, samples, left = done.stdout.splitlines()
    assert checkpoint.startswith(f"{small}/checkpoints: the disk is full (0.0 GB free")
    assert samples.startswith(f"{small}: the disk is full (0.0 GB free")
    assert left == "['000000001'] ['checkpoints'] 2"


def test_a_stage_whose_outputs_do_not_fit_stops_before_it_starts(tmp_path, tiny_overrides, free):
    images = 997
    config = load_config("configs/digits.yaml", [*tiny_overrides, f"output={tmp_path}"])
    nodes, store = flow(config), Store(str(tmp_path))
    units = [{"split": "train", "rows": images}, {"split": "test", "rows": 400}]
    for node in nodes["moments"].inputs.values():
        node.artifact(store).publish({"units": units, "classes": 10})
    labels = nodes["labels"]
    labels.artifact(store).publish({})
    moments = images * 2 * 64 * 2  # mean and logvar of 64 pixels, float16
    free(moments - 1)
    with pytest.raises(StageError, match=rf"{nodes['moments'].digest}: about 0.0 GB will be written"):
        make(config, "moments")
    needed = _bytes_to_write(config, nodes, store, nodes["moments"])
    assert needed == moments


def test_further_sets_of_images_need_the_room_of_the_first(tmp_path, tiny_overrides):
    config = load_config("configs/digits.yaml", [*tiny_overrides, f"output={tmp_path}", "sweep.seeds=2"])
    nodes, store = flow(config), Store(str(tmp_path))
    units = [{"split": "train", "rows": 997}, {"split": "test", "rows": 400}]
    nodes["index"].artifact(store).publish({"units": units, "classes": 10})
    for name in ("samples", "sample_features"):
        first, further = (
            _bytes_to_write(config, nodes, store, nodes[f"{name}{seed}"]) for seed in ("", ":seed=1")
        )
        assert first == further > 0
