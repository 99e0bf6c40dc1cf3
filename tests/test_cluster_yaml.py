"""cluster.yaml as `ray up` carries it out: merged with the defaults of Ray's AWS provider."""

import ipaddress
import shlex

import pytest
import yaml

from tests.helpers.paths import ROOT

STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def cloud():
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def start(cloud, commands):
    """The one of these commands that starts Ray."""
    [command] = [command for command in cloud[commands] if " ray start " in command]
    return command


def options(cloud, commands):
    """The options of the command that starts Ray: name to value."""
    words = start(cloud, commands).split()
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
    command = start(cloud, f"{node}_start_ray_commands")
    assert "PATH=$HOME/venv/bin:$PATH" in command[: command.index(" ray start")]


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


def test_every_node_is_asked_for_in_several_zones(cloud):
    """By the key that Ray reads: it passes over SubnetId, and takes any subnet of the account."""
    for kind in cloud["available_node_types"].values():
        assert len(set(kind["node_config"]["SubnetIds"])) > 1
        assert "SubnetId" not in kind["node_config"]


def test_every_node_may_hold_many_connections(cloud):
    for commands in STARTS:
        assert start(cloud, commands).startswith("ulimit -n 65536; ")


def test_the_head_runs_no_actors_and_the_autoscaler_knows(cloud):
    assert options(cloud, "head_start_ray_commands")["num-cpus"] == "0"
    assert "num-cpus" not in options(cloud, "worker_start_ray_commands")
    assert cloud["available_node_types"][cloud["head_node_type"]]["resources"] == {"CPU": 0}


def test_it_grows_from_no_workers_with_spot_gpus_and_cpus_for_the_rest(cloud):
    types = cloud["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != cloud["head_node_type"]}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= cloud["max_workers"]
    spot, on_demand = workers["gpu_spot"], workers["gpu_on_demand"]
    assert spot["resources"] == on_demand["resources"]
    assert spot["resources"]["GPU"] >= 1
    market = spot["node_config"].pop("InstanceMarketOptions")
    assert market == {"MarketType": "spot"}
    assert spot["node_config"] == on_demand["node_config"]  # the same machine, at another price
    spot["node_config"]["InstanceMarketOptions"] = market
    assert "GPU" not in workers["cpu_worker"]["resources"]
    assert workers["cpu_worker"]["resources"]["CPU"] >= 1


@pytest.mark.parametrize(
    ("demand", "expected"),
    [
        ([{"GPU": 1.0, "CPU": 0.5}] * 5, {"gpu_spot": 5}),
        ([{"GPU": 1.0, "CPU": 0.5}] * 10, {"gpu_spot": 8, "gpu_on_demand": 2}),
        ([{"CPU": 0.25}] * 16, {"cpu_worker": 1}),  # readers alone start no GPU machine
        ([{"GPU": 1.0, "CPU": 0.5}, {"CPU": 0.25}, {"CPU": 0.25}], {"gpu_spot": 1}),  # they share the actor's
    ],
)
def test_rays_autoscaler_starts_spot_machines_first_and_no_gpu_without_need(demand, expected):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(yaml.safe_load((ROOT / "cluster.yaml").read_text()), skip_content_hash=True)
    request = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(map(ResourceRequestUtil.make, demand)),
        disable_launch_config_check=True,
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == expected
    assert not reply.infeasible_resource_requests


def test_a_worker_passes_on_the_notice_that_it_is_taken_back(cloud):
    from dpt_ray.cluster import spot

    [watch] = [command for command in cloud["worker_start_ray_commands"] if spot.__name__ in command]
    assert cloud["worker_start_ray_commands"].index(watch) == 2  # after `ray start`
    words = shlex.split(watch)
    python = words.index("~/venv/bin/python")
    assert words[python + 1 : python + 4] == ["-m", spot.__name__, "$RAY_HEAD_IP:6379"]
    assert words[-1] == "&"  # or the node would never be up
    assert not [command for command in cloud["head_start_ray_commands"] if spot.__name__ in command]


def test_it_is_closed(cloud):
    for commands in STARTS:
        for command in cloud[commands][1:]:  # after `ray stop`
            assert "RAY_AUTH_MODE=token" in command
            assert "RAY_AUTH_TOKEN_PATH=" in command
    host = options(cloud, "head_start_ray_commands")["dashboard-host"]
    assert ipaddress.ip_address(host).is_loopback
    # A group that Ray makes itself admits SSH from everywhere.
    assert "security_group" not in cloud["provider"]
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in cloud["available_node_types"].values())


def test_it_holds_no_credentials(cloud):
    text = yaml.safe_dump(cloud).lower()
    assert not [word for word in ("aws_access_key", "aws_secret", "akia", "password") if word in text]
