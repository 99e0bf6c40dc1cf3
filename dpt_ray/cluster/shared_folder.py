"""Whether all nodes of a cluster see the same folder."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from pathlib import Path

from dpt_ray.cluster.session import connect
from dpt_ray.config.sections import Compute

WAIT = 60.0  # seconds for the answers of all nodes
PATIENCE = 5.0  # seconds in which a network file system shows a new file elsewhere


def node_without(folder: str, compute: Compute) -> str | None:
    """Return the name of a node that does not see what is written here to a local folder; None if all do.

    A node that leaves meanwhile, or does not answer, is passed over. Nodes that join later are not asked.
    """
    connect(compute)
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(alive) < 2:
        return None
    mark = Path(folder, f".shared-{uuid.uuid4().hex[:8]}")
    mark.touch()
    try:
        asked = {}
        for node, name in alive.items():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(_sees).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[task.remote(str(mark))] = name
        for answer in ray.wait(list(asked), num_returns=len(asked), timeout=WAIT)[0]:
            with suppress(RayError):
                if not ray.get(answer):
                    return str(asked[answer])
        return None
    finally:
        mark.unlink(missing_ok=True)


def _sees(mark: str) -> bool:
    end = time.monotonic() + PATIENCE
    while not Path(mark).exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
