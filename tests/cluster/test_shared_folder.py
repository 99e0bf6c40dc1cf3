"""A run's local output on a cluster of several nodes, which must all see it."""

import os
import subprocess
import sys

import pytest

from dpt_ray.config import load_config
from tests.helpers.cluster import SCRATCH, free_ports, ray_start
from tests.helpers.paths import DIGITS, ROOT
from tests.helpers.processes import kill_session
from tests.helpers.tiny_run import TINY

PRIVATE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


@pytest.fixture
def two_nodes(tmp_path):
    """The address of a cluster whose second node has another disk where the first one has tmp_path/own."""
    own = tmp_path / "own"
    own.mkdir()
    mount = f"mount -t tmpfs none {own}"
    try:
        subprocess.run([*PRIVATE, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user cannot mount a disk")
    port, agent, client, other = free_ports(4)
    head = ray_start(
        *("--head", "--num-cpus=1", f"--port={port}", f"--temp-dir={SCRATCH}/shared"),
        *("--include-dashboard=false", f"--dashboard-agent-listen-port={agent}"),
        f"--ray-client-server-port={client}",
    )
    address = f"127.0.0.1:{port}"
    node = ray_start(
        *(f"--address={address}", "--num-cpus=1", f"--dashboard-agent-listen-port={other}"),
        within=(*PRIVATE, f'{mount} && exec "$@"', "sh"),
        RAY_ADDRESS=address,
    )
    yield address
    kill_session(node)
    kill_session(head)


def test_an_output_that_a_node_does_not_see_is_refused_before_any_work(two_nodes, tmp_path):
    def run(output):
        command = (sys.executable, "-m", "dpt_ray.cli", "run", str(DIGITS), *TINY, f"output={output}")
        environment = os.environ | {"RAY_ADDRESS": two_nodes}
        return subprocess.run(
            [*command, "--until", "index"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    refused = run(tmp_path / "own")
    assert refused.returncode == 2, refused.stderr
    [line] = refused.stderr.strip().splitlines()
    assert line.startswith(
        f"error: output: what is written to '{tmp_path}/own' here is not seen on the cluster's node "
    )
    assert not list((tmp_path / "own").iterdir())
    seen = run(tmp_path / "both")
    assert seen.returncode == 0, seen.stderr
    assert (tmp_path / "both" / "store" / "index").is_dir()
    assert (tmp_path / "both" / "runs" / load_config(DIGITS).name).is_dir()
