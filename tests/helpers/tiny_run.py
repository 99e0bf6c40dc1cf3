"""A run of the digits with tiny settings, and what is published of it."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from dpt_ray.config import load_config
from dpt_ray.store.artifact import Artifact
from tests.helpers.paths import DIGITS
from tests.helpers.runs import make

TINY = (
    "pretrain.steps=20",
    "pretrain.checkpoint_every=4",
    "pretrain.contrast_group=32",  # half a batch: two workers can share it
    "evaluate.referee.steps=10",
    "diffusion.steps=24",
    "diffusion.checkpoint_every=4",
    "generate.images_per_class=32",
    "generate.indices_per_shard=8",
    "retrain.images_per_class=16",
    "sweep.images_per_class=[16]",
    "sweep.real_weight=[1.0]",
    "compute.train_workers=0",
    "compute.actors=1",
)
PAYLOADS = {".safetensors", ".parquet"}


@dataclass(frozen=True)
class TinyRun:
    """A run of configs/digits.yaml with tiny settings below an output folder."""

    output: Path
    overrides: tuple[str, ...] = TINY

    @property
    def config(self):
        return load_config(DIGITS, [*self.overrides, f"output={self.output}"])

    def nodes(self):
        from dpt_ray.pipeline.flow import flow

        return flow(self.config)

    def artifact(self, name):
        from dpt_ray.store.artifact import Store

        return self.nodes()[name].artifact(Store(str(self.output)))

    def make(self, *targets):
        """Makes the targets with this process as the driver; what was made."""
        return make(self.config, *targets)

    def start(self, command="run", **environment):
        """Starts `dpt COMMAND` as a process group of its own."""
        arguments = [command, str(DIGITS), *self.overrides, f"output={self.output}"]
        return subprocess.Popen(
            [sys.executable, "-m", "dpt_ray.cli", *arguments],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, command="run", **environment):
        """Runs `dpt COMMAND` to its end: (exit code, standard output, standard error)."""
        process = self.start(command, **environment)
        out, error = process.communicate(timeout=240)
        return process.returncode, out, error

    def copy_to(self, folder, *changes, without=()):
        """The same run in another folder, with some settings changed and some artifacts not made yet."""
        shutil.copytree(self.output, folder, symlinks=True, dirs_exist_ok=True)
        copy = replace(self, output=folder)
        for name in without:
            shutil.rmtree(Path(copy.artifact(name).path("")))
        return replace(copy, overrides=(*self.overrides, *changes))

    def payloads(self, name):
        """What a published artifact holds, as hashes by shard or file, and the course of its training."""
        artifact = self.artifact(name)
        assert artifact.published, f"{name} is not published"
        folder = Path(artifact.path(""))
        found = {path.name: digest(path) for path in folder.iterdir() if path.suffix in PAYLOADS}
        found |= {key: digest(folder / entry["file"]) for key, entry in artifact.shards().items()}
        if artifact.exists("log.jsonl"):
            from dpt_ray.training.log import read_log

            columns = ("step", "loss", "lr", "grad_norm")
            found["log"] = [[record[key] for key in columns] for record in read_log(artifact)]
        return found


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def files(folder):
    """The modification time of every file below a folder."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def shard_files(artifact: Artifact):
    """The published payload files of an artifact: hash and modification time by shard."""
    found = {}
    for key, entry in artifact.shards().items():
        path = Path(artifact.path(entry["file"]))
        found[key] = (entry["file"], digest(path), path.stat().st_mtime_ns)
    return found
