"""A Ray cluster of several nodes on this machine, which may be killed, added and drained."""

import os
import re
import signal
import subprocess
import sys
import tempfile

from tests.helpers.cluster import free_ports, ray_start
from tests.helpers.processes import command_line, kill_session, session_pids

# A node whose raylet refuses connections is dead after 1.5 s instead of 15, and so on.
QUICK = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


class Nodes:
    """A Ray cluster of nodes of one CPU each on this machine; its head computes nothing."""

    def __init__(self):
        self.scratch = tempfile.mkdtemp(prefix="dpt", dir="/tmp")
        self.start()

    def start(self):
        port, agent, client = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        self.head = ray_start(
            *("--head", "--num-cpus=0", f"--port={port}", f"--temp-dir={self.scratch}/ray"),
            *("--include-dashboard=false", f"--dashboard-agent-listen-port={agent}"),
            f"--ray-client-server-port={client}",
            **self.environment(),
        )
        self.nodes = []

    def environment(self):
        """With another cluster's address Ray Train's cleaner asks that one whether the controller lives."""
        return QUICK | {"RAY_ADDRESS": self.address}

    def need(self, count):
        """Adds nodes, or takes idle ones away, until there are so many."""
        while len(self.nodes) < count:
            [agent] = free_ports(1)
            address = (f"--address={self.address}", "--num-cpus=1", f"--dashboard-agent-listen-port={agent}")
            self.nodes.append(ray_start(*address, **self.environment()))
        while len(self.nodes) > count:
            kill_session(self.nodes.pop())

    def training(self):
        """The nodes that training workers run on."""
        return [node for node in self.nodes if titled(node, "RayTrainWorker")]

    def kill_raylet(self, node):
        [raylet] = titled(node, "raylet/raylet")
        os.kill(raylet, signal.SIGKILL)

    def drain(self, node, seconds):
        """Says that the node will be taken away, as an autoscaler does on a spot notice."""
        [raylet] = titled(node, "raylet/raylet")
        [found] = re.findall(r"--node_id=(\w+)", command_line(raylet))
        drain = (f"--node-id={found}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot")
        command = (sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}")
        deadline = f"--deadline-remaining-seconds={seconds}"
        subprocess.run([*command, *drain, deadline], check=True, capture_output=True)

    def kill(self):
        for process in (*self.nodes, self.head):
            kill_session(process)
        self.nodes = []


def titled(process, title):
    return [pid for pid in session_pids(process.pid) if title in command_line(pid)]
