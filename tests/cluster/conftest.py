"""What the tests of dpt_ray/cluster share."""

import pytest


@pytest.fixture
def made_of(monkeypatch):
    """Lets Ray tell of a cluster of such nodes, and of one that is gone."""
    import ray

    def tell(*nodes):
        known = [{"Alive": True, "NodeID": f"node-{n}", "Resources": node} for n, node in enumerate(nodes)]
        gone = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
        monkeypatch.setattr(ray, "nodes", lambda: [*known, gone])

    return tell
