"""cluster.yaml as `ray up` carries it out: merged with the defaults of Ray's AWS provider."""

import ipaddress

import pytest
import yaml

from tests.helpers.paths import ROOT

STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def cloud():
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def options(cloud, commands):
    """The options of the last of these commands, which starts Ray: name to value."""
    words = cloud[commands][-1].split()
    assert words.count("ray") == 1
    assert words[words.index("ray") + 1] == "start"
    pairs = (word.removeprefix("--").partition("=") for word in words if word.startswith("--"))
    return {name: value for name, _, value in pairs}


def test_ray_accepts_it(cloud):
    from ray.autoscaler._private.util import validate_config

    validate_config(cloud)


@pytest.mark.parametrize("node", ["head", "worker"])
def test_every_package_goes_where_ray_runs(cloud, node):
    """A default of the provider would install by the system's pip, and `ray start` would not see it."""
    commands = cloud[f"{node}_setup_commands"]
    installs = [command for command in commands if "pip install" in command]
    assert installs
    assert all(command.startswith("~/venv/bin/pip ") for command in installs)
    assert commands.index("test -d ~/venv || python3 -m venv ~/venv") < commands.index(installs[0])
    start = cloud[f"{node}_start_ray_commands"][-1]
    assert "PATH=$HOME/venv/bin:$PATH" in start[: start.index(" ray start")]


def test_the_autoscaler_on_the_head_has_boto3_of_the_pinned_version(cloud):
    [install] = [command for command in cloud["head_setup_commands"] if "boto3" in command]
    assert install == "~/venv/bin/pip install -q -c ~/setup/constraints.txt boto3"
    assert any(line.startswith("boto3==") for line in (ROOT / "constraints.txt").read_text().splitlines())


def test_every_node_has_an_instance_profile_and_the_workers_not_the_heads(cloud):
    """Ray makes one where the head has none, and gives workers none at all."""
    types = cloud["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in types.items()}
    head = profiles.pop(cloud["head_node_type"])
    assert profiles
    assert all(name != head for name in profiles.values())


def test_every_node_may_hold_many_connections(cloud):
    for commands in STARTS:
        assert cloud[commands][-1].startswith("ulimit -n 65536; ")


def test_the_head_runs_no_actors_and_the_autoscaler_knows(cloud):
    assert options(cloud, "head_start_ray_commands")["num-cpus"] == "0"
    assert "num-cpus" not in options(cloud, "worker_start_ray_commands")
    assert cloud["available_node_types"][cloud["head_node_type"]]["resources"] == {"CPU": 0}


def test_it_grows_from_no_workers_with_spot_gpus_and_cpus_for_the_rest(cloud):
    types = cloud["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != cloud["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= cloud["max_workers"]
    assert workers["gpu_worker"]["resources"]["GPU"] >= 1
    assert workers["gpu_worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "GPU" not in workers["cpu_worker"]["resources"]
    assert workers["cpu_worker"]["resources"]["CPU"] >= 1


def test_it_is_closed(cloud):
    for commands in STARTS:
        start = cloud[commands][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_AUTH_TOKEN_PATH=" in start
    host = options(cloud, "head_start_ray_commands")["dashboard-host"]
    assert ipaddress.ip_address(host).is_loopback
    # A group that Ray makes itself admits SSH from everywhere.
    assert "security_group" not in cloud["provider"]
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in cloud["available_node_types"].values())


def test_it_holds_no_credentials(cloud):
    text = yaml.safe_dump(cloud).lower()
    assert not [word for word in ("aws_access_key", "aws_secret", "akia", "password") if word in text]
