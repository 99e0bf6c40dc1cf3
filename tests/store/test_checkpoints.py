"""What killed trainings leave of their checkpoints is removed, in the store and on the node."""

import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpt_ray.cluster.continuation import continue_shorter
from dpt_ray.store import cache
from dpt_ray.store.artifact import Artifact, Store
from dpt_ray.store.checkpoints import checkpoint_names, load_checkpoint, save_checkpoint
from dpt_ray.training.log import read_log
from tests.helpers.latents import make_latents

# A writer that is killed: while safetensors writes, before the tensors are published, before their JSON.
KILLED = """
    import os, pathlib, signal, sys
    import safetensors.torch, torch
    from dpt_ray.store import artifact as artifacts
    from dpt_ray.store.checkpoints import save_checkpoint

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def writing(tensors, path):
        path.with_name(".tmpAbCdEf").write_bytes(b"half")  # the name that safetensors writes under
        die()

    for moment in sys.argv[2:]:
        if os.fork():
            os.wait()
            continue
        if moment == "writing":
            safetensors.torch.save_file = writing
        elif moment == "written":
            artifacts.Artifact._put = die
        else:
            artifacts.Artifact.write_json = die
        save_checkpoint(artifacts.Artifact(sys.argv[1] + moment), 5, {"w": torch.zeros(9)}, {"step": 5})
"""


def killed_at(uri, node, *moments):
    child = [sys.executable, "-c", textwrap.dedent(KILLED), uri, *moments]
    subprocess.run(child, env=os.environ | {"TMPDIR": str(node)}, check=True, timeout=120)


def names(out):
    return sorted(path.name for path in Path(out.path("checkpoints")).iterdir())


def test_the_next_checkpoint_removes_what_a_killed_writer_left(tmp_path, node):
    moments = ("writing", "written", "published")
    killed_at(f"{tmp_path}/", node, *moments)
    for moment in moments:
        out = Artifact(f"{tmp_path}/{moment}")
        assert len(names(out)) == 1 and checkpoint_names(out) == []
        save_checkpoint(out, 6, {"w": torch.zeros(9)}, {"step": 6})
        assert names(out) == ["000000006.json", "000000006.safetensors"]


def test_what_nfs_keeps_of_a_removed_file_is_left_to_it(tmp_path):
    out = Artifact(f"{tmp_path}/it")
    save_checkpoint(out, 5, {"w": torch.zeros(9)}, {"step": 5})
    out.write_bytes("checkpoints/.nfs00000001", b"")
    save_checkpoint(out, 6, {"w": torch.zeros(9)}, {"step": 6})
    assert ".nfs00000001" in names(out)
    assert checkpoint_names(out) == ["000000005", "000000006"]


def test_json_that_a_late_writer_published_without_its_tensors_is_no_checkpoint(tmp_path):
    out = Artifact(f"{tmp_path}/it")
    save_checkpoint(out, 5, {"w": torch.zeros(9)}, {"step": 5})
    out.write_json("checkpoints/000000006.json", {"step": 6})
    assert checkpoint_names(out) == ["000000005"] and load_checkpoint(out)[1] == {"step": 5}
    save_checkpoint(out, 6, {"w": torch.ones(9)}, {"step": 6})
    assert load_checkpoint(out)[0]["w"].tolist() == [1.0] * 9


def test_the_next_writer_to_a_remote_store_removes_what_killed_ones_left_on_the_node(node):
    killed_at("memory://gone", node, "written")
    assert [path.name[:11] for path in cache.folder().glob("scratch/*/.*")] == [".000000005."]
    with Artifact(f"memory://{uuid.uuid4().hex}").writing("a") as one:
        with Artifact(f"memory://{uuid.uuid4().hex}").writing("b") as other:
            other.write_bytes(b"")
        one.write_bytes(b"")  # that of a writer that lives is left to it
    assert list(cache.folder().glob("scratch/*")) == []


def test_a_node_keeps_no_copy_of_a_checkpoint_but_the_newest(node):
    out = Artifact(f"memory://{uuid.uuid4().hex}")
    for step in range(1, 5):
        save_checkpoint(out, step, {"w": torch.full((9,), step)}, {"step": step})
        tensors, meta = load_checkpoint(out)
        assert meta == {"step": step} and tensors["w"].tolist() == [step] * 9
    assert [path.name for path in cache.folder().glob("*/*.safetensors")] == ["000000004.safetensors"]


def test_a_training_that_went_on_from_a_remote_checkpoint_keeps_no_copy_of_it(tmp_path, node):
    latents = make_latents(tmp_path / "store")
    latents.make("diffusion.steps=4")
    elsewhere = latents.elsewhere()
    assert elsewhere.make("diffusion.steps=8").out.manifest["continued_at_step"] == 4
    assert list(cache.folder().glob("*/0*.safetensors")) == []


class Killed(BaseException):
    """What ends a process at once."""


# On a remote store only the checkpoint's tensors and its JSON are written by way of a local file.
@pytest.mark.parametrize(("place", "writes"), [("here", 4), ("elsewhere", 2)])
def test_a_training_killed_while_it_takes_over_a_shorter_one_keeps_the_whole_curve(
    tmp_path, monkeypatch, place, writes
):
    latents = make_latents(tmp_path / "store")
    latents.make("diffusion.steps=8")
    for moment in range(writes + 1):
        started = latents.elsewhere() if place == "elsewhere" else copy_of(latents, moment)
        with monkeypatch.context() as killing:
            killed = killed_at_write(killing, moment, started.task("diffusion.steps=16"))
        assert killed == (moment < writes)
        task = started.make("diffusion.steps=16")
        assert [record["step"] for record in read_log(task.out)] == list(range(2, 17, 2))
        assert task.out.manifest["continued_at_step"] == 8


def copy_of(latents, number):
    folder = f"{latents.store.uri}-{number}"
    shutil.copytree(latents.store.uri, folder)
    return replace(latents, store=Store(folder))


def killed_at_write(patch, moment, task):
    """Takes over a shorter training, and is killed in the write of that number, if there is one."""
    writes = itertools.count()
    real = Artifact._put

    def publish(self, *written):
        if next(writes) == moment:
            raise Killed
        real(self, *written)

    patch.setattr(Artifact, "_put", publish)
    try:
        continue_shorter(task)
    except Killed:
        return True
    return False
