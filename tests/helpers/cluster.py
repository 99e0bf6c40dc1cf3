"""A local Ray cluster. Nothing here touches the home folder or a cluster that the tests did not start."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import command_line, kill_session, session_pids, wait_until

SCRATCH = tempfile.mkdtemp(prefix="dpt", dir="/tmp")  # short: sockets' paths have at most 107 bytes
_token = Path(SCRATCH, "token")
_token.touch(mode=0o600)
_token.write_text(secrets.token_hex(32))
# Ray reads these when it is first imported.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(_token), RAY_TMPDIR=SCRATCH)
os.environ.pop("RAY_ADDRESS", None)


# A job's python is the one of the tests, whatever the cluster's shell would find.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of two CPUs on this machine, with a dashboard that takes jobs."""

    address: str
    dashboard: str
    session: int

    def pids(self, title):
        """The live processes of this cluster whose title contains `title`."""
        return [pid for pid in session_pids(self.session) if title in command_line(pid)]


def ray_start(*options, within=(), **environment):
    """`ray start --block` in a session of its own, by a command `within`: the process, once the node runs."""
    log = Path(tempfile.mkstemp(".log", "ray-", SCRATCH)[1])
    process = subprocess.Popen(
        [
            *(
                *within,
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--block",
                "--disable-usage-stats",
            ),
            *("--node-ip-address=127.0.0.1", *options),
        ],
        env=os.environ | {"PATH": PATH} | environment,
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


def gpu_head(name, **environment):
    """A cluster of its own whose head has two CPUs and pretends one GPU: its process and its address."""
    port, agent, client = free_ports(3)
    head = ray_start(
        *("--head", "--num-cpus=2", "--num-gpus=1", f"--memory={8 << 30}", f"--port={port}"),
        *(f"--temp-dir={SCRATCH}/{name}", "--include-dashboard=false"),
        *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
        **environment,
    )
    return head, f"127.0.0.1:{port}"


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
