"""A tiny run, and one local Ray cluster for all tests that need it.

Nothing here touches the home folder (the token of the authentication lies in a temporary one) or a Ray
cluster that the tests did not start: what is killed is found by the session of its own `ray start`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpt_ray.config import load_config
from dpt_ray.store.artifact import Artifact

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits.yaml"
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

_scratch = tempfile.mkdtemp(prefix="dpt", dir="/tmp")  # short: sockets' paths have at most 107 bytes
_token = Path(_scratch, "token")
_token.touch(mode=0o600)
_token.write_text(secrets.token_hex(32))
# Ray reads these when it is first imported.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(_token), RAY_TMPDIR=_scratch)
os.environ.pop("RAY_ADDRESS", None)


def pytest_sessionfinish(session):
    shutil.rmtree(_scratch, ignore_errors=True)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of two CPUs on this machine, with a dashboard that takes jobs."""

    address: str
    dashboard: str
    session: int

    def pids(self, title):
        """The live processes of this cluster whose title contains `title`."""
        return [pid for pid in session_pids(self.session) if title in command_line(pid)]


@pytest.fixture(scope="session")
def cluster():
    port, dashboard, agent, client = free_ports(4)
    head = ray_start(
        *("--head", "--num-cpus=2", f"--port={port}", f"--temp-dir={_scratch}/ray"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
    )
    try:
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        yield Cluster(os.environ["RAY_ADDRESS"], f"http://127.0.0.1:{dashboard}", head.pid)
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        kill_session(head)


def ray_start(*options, **environment):
    """`ray start --block` in a session of its own: the process, once its node runs."""
    log = Path(tempfile.mkstemp(".log", "ray-", _scratch)[1])
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", *options),
        ],
        env=os.environ | environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_until(lambda: "--block" in log.read_text(), process, 180)
    except BaseException:
        kill_session(process)
        raise
    return process


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
        from rich.console import Console

        from dpt_ray.engine.progress import Display
        from dpt_ray.pipeline import run as runs

        return runs.run(self.config, Display(Console(quiet=True)), targets)[0].made

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


PAYLOADS = {".safetensors", ".parquet"}


@pytest.fixture(scope="session")
def tiny_overrides():
    """Settings under which everything is made in about a minute, too little to learn anything."""
    return TINY


@pytest.fixture(scope="session")
def finished(cluster, tmp_path_factory):
    """An undisturbed tiny run from the images to the report; not to be written to."""
    run = TinyRun(tmp_path_factory.mktemp("finished"))
    run.make("report")
    return run


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file for FID's Inception with random weights, of a scale at which activations keep theirs."""
    import math
    from unittest.mock import patch

    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    unloaded = patch.object(FeatureExtractorInceptionV3, "load_state_dict")
    with torch.device("meta"), patch("torch.load"), unloaded:
        shapes = FeatureExtractorInceptionV3("shapes", ["2048"], "none").state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in shapes.items():
        noise = torch.randn(like.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif like.ndim > 1:
            state[name] = noise * math.sqrt(2 / like[0].numel())
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = 1 + 0.1 * noise.abs()
        else:
            state[name] = 0.1 * noise
    path = tmp_path_factory.mktemp("inception") / "random_inception.pth"
    torch.save(state, path)
    return path


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def files(folder):
    """The modification time of every file below a folder."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def wait_until(condition, process, seconds=120):
    """Looks every few milliseconds, while `process` lives, until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with exit code {process.returncode} before its time"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.003)


def kill_group(process):
    """SIGKILL to a process that leads its group, and all of the group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session_pids(session):
    """The live processes of a session: what its leader started, and what those did."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == session and command_line(pid):  # a zombie has no command line
                found.append(pid)
    return found


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill_session(leader):
    """SIGKILL to every process of the session that `leader` was started with."""
    while pids := session_pids(leader.pid):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        leader.poll()
        time.sleep(0.05)
    leader.wait()


def free_ports(count):
    """Ports that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def shard_files(artifact: Artifact):
    """The published payload files of an artifact: hash and modification time by shard."""
    found = {}
    for key, entry in artifact.shards().items():
        path = Path(artifact.path(entry["file"]))
        found[key] = (entry["file"], digest(path), path.stat().st_mtime_ns)
    return found


@contextlib.contextmanager
def object_store():
    """An S3-compatible server: the environment that leads to it, set in this process too."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield environment
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()


@pytest.fixture
def s3_bucket(tmp_path, monkeypatch):
    """The URI of an empty bucket on an S3-compatible server, and its file system."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where downloads are kept
    with object_store():
        import s3fs

        fs = s3fs.S3FileSystem()
        name = f"bucket-{secrets.token_hex(4)}"  # the servers of one process share what they hold
        fs.mkdir(name)
        yield f"s3://{name}", fs


class Hub(MemoryFileSystem):
    """A Hugging Face hub in memory: what is there is what a test has put there."""

    protocol = ("hf",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("hf://"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a file at ORGANISATION/NAME/FILE of the hub."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where downloads are kept
    real = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", Hub, clobber=True)
    yield lambda path, data: Hub().pipe_file(f"hf://{path}", data)
    fsspec.register_implementation("hf", real, clobber=True)
