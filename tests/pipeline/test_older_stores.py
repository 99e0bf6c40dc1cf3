"""A store that an earlier version of the code published is found done.

`golden/older_store` has what a run of the digits published at commit 622e643, before the package was split
into its present rooms: its resolved configuration and, of each manifest, what a node is found by.
"""

import json

import pytest
from typer.testing import CliRunner

from dpt_ray.cli import app
from dpt_ray.config import load_config
from dpt_ray.engine.execute import execute
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.status import status
from dpt_ray.store.artifact import Store
from tests.helpers.paths import GOLDEN
from tests.helpers.runs import quiet

OLDER = GOLDEN / "older_store"
CONFIG = OLDER / "config.yaml"
# Measured anew, in seconds: the few labels no longer judge the pseudo-labels.
AGAIN = {"probe", "evaluation", "report"}


@pytest.fixture
def output(tmp_path):
    """An output folder with nothing but the manifests."""
    for name, manifest in json.loads((OLDER / "manifests.json").read_text()).items():
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(manifest))
    return tmp_path


def test_a_plan_shows_each_node_as_done(output):
    result = CliRunner().invoke(app, ["plan", str(CONFIG), f"output={output}"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    states = {row[1].strip(): row[4].strip() for row in rows if len(row) == 7}
    done = {name for name, state in states.items() if state == "done"}
    assert done == flow(load_config(CONFIG)).keys() - AGAIN


def test_the_engine_makes_none_of_them_again(output):
    config = load_config(CONFIG)
    nodes = {name: node for name, node in flow(config).items() if name not in AGAIN}
    outcome = execute(list(nodes.values()), Store(str(output)), config.compute, quiet(), {})
    assert (outcome.made, set(outcome.reused)) == ([], set(nodes))


def test_a_changed_setting_is_told_from_what_was_published(output):
    rows = {row.name: row for row in status(load_config(CONFIG, [f"output={output}", "retrain.l2=0.01"]))}
    assert rows["retrained"].why == "l2 is 0.01, published with 0.0025"
    assert {name for name, row in rows.items() if not row.manifest} == {"retrained"} | AGAIN
