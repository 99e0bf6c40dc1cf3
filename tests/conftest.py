"""The clusters, runs and stores that several tests share."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import sys
import tempfile
from unittest.mock import patch

import fsspec
import pytest

from tests.helpers.cluster import SCRATCH, Cluster, free_ports, ray_start
from tests.helpers.object_store import Hub, object_store
from tests.helpers.processes import kill_session
from tests.helpers.tiny_run import TINY, TinyRun

# What starts a real cluster of several processes; a test with one of them is marked.
CLUSTERS = {"autoscaling", "cluster", "finished", "nodes", "one_cpu", "one_gpu"}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    for item in items:
        if CLUSTERS & set(item.fixturenames):
            item.add_marker(pytest.mark.cluster)


def pytest_sessionfinish(session):
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster():
    port, dashboard, agent, client = free_ports(4)
    head = ray_start(
        *("--head", "--num-cpus=2", f"--port={port}", f"--temp-dir={SCRATCH}/ray"),
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


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node whose temporary folder, in which copies of remote files are kept, is empty."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


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


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a file at ORGANISATION/NAME/FILE of the hub."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where downloads are kept
    real = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", Hub, clobber=True)
    yield lambda path, data: Hub().pipe_file(f"hf://{path}", data)
    fsspec.register_implementation("hf", real, clobber=True)


@pytest.fixture
def dpt(monkeypatch, capsys):
    """Runs `dpt` with arguments; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "250")
    for name in ("RAY_JOB_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR", "DPT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)

    from dpt_ray.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dpt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def no_credentials(monkeypatch, tmp_path, tmp_path_factory):
    """A home without AWS credentials, where nothing else gives them, and an empty current folder."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.chdir(tmp_path)
