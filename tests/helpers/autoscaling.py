"""A cluster that adds nodes on demand, on this machine: Ray's own autoscaler over a provider of raylets.

Ray's test provider is named as an external one: as "fake_multinode" it needs a file that the wheel lacks.
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.cluster import SCRATCH, free_ports, ray_start
from tests.helpers.paths import ROOT
from tests.helpers.processes import kill_session

HEAD = "f" * 51 + "00000"  # the id that the provider gives the head
COMMANDS = (  # none: the nodes are this machine
    "initialization_commands",
    "setup_commands",
    *(f"{node}_{what}" for node in ("head", "worker") for what in ("setup_commands", "start_ray_commands")),
)
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


@dataclass(frozen=True)
class AutoscalingCluster:
    """A head without CPUs, and an autoscaler that adds nodes of one type `gpu`."""

    address: str
    logs: Path

    def drive(self, program, *arguments):
        """Run `python -c program ...` as a driver of this cluster; the finished process."""
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | {"RAY_ADDRESS": self.address, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def decisions(self):
        """What the autoscaler did: lines as "Adding 2 node(s) of type gpu."."""
        lines = (self.logs / "monitor.log").read_text().splitlines()
        found = [line.partition(" -- ")[2] for line in lines if "event_logger" in line]
        return [line for line in found if line.startswith(("Adding", "Removing"))]


@contextmanager
def autoscaling_cluster(resources, most, idle_minutes):
    """A cluster from no worker to `most` nodes with these resources each; they leave when idle."""
    port, agent, client = free_ports(3)
    config = {
        "cluster_name": "test",
        "max_workers": most,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter", *COMMANDS)},
        "file_mounts_sync_continuously": False,
    }
    file = Path(SCRATCH, f"autoscaling-{port}.json")
    file.write_text(json.dumps(config))
    head = ray_start(
        *("--head", "--num-cpus=0", f"--port={port}", f"--temp-dir={SCRATCH}/ray{port}"),
        *("--include-dashboard=false", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--autoscaling-config={file}"),
        RAY_enable_autoscaler_v2="1",  # as `ray up` does
        RAY_FAKE_CLUSTER="1",
        RAY_CLOUD_INSTANCE_ID=HEAD,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD,
        AUTOSCALER_UPDATE_INTERVAL_S="1",
    )
    try:
        logs = Path(SCRATCH, f"ray{port}", "session_latest", "logs")
        yield AutoscalingCluster(f"127.0.0.1:{port}", logs)
    finally:
        kill_session(head)
