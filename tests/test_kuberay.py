"""The manifests for Kubernetes: fields that exist, the package's image, the node types of cluster.yaml."""

import shlex
from importlib.metadata import version

import pytest
import yaml

from dpt_ray.config import load_config
from dpt_ray.config.run import Config
from tests.helpers.paths import CONFIGS, ROOT


def fields(names, **typed):
    """The fields of a type: those with a type to look into by name, the others None."""
    return dict.fromkeys(names.split()) | typed


# The fields of each type, by the reference of KubeRay's ray.io/v1 (docs.ray.io, "KubeRay CRD API reference",
# read 2026-11-29) and of Kubernetes' core/v1; of the latter those that the manifests may use.
FIELDS = {
    "RayCluster": fields("apiVersion kind", metadata="Meta", spec="RayClusterSpec"),
    "RayJob": fields("apiVersion kind", metadata="Meta", spec="RayJobSpec"),
    "Meta": fields("name labels annotations"),
    "RayClusterSpec": fields(
        "suspend managedBy headServiceAnnotations enableInTreeAutoscaling rayVersion "
        "gcsFaultToleranceOptions",
        authOptions="AuthOptions",
        autoscalerOptions="AutoscalerOptions",
        headGroupSpec="HeadGroupSpec",
        workerGroupSpecs="WorkerGroupSpec",
    ),
    "AuthOptions": fields("mode secretName enableK8sTokenAuth"),
    "AutoscalerOptions": fields(
        "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env "
        "envFrom volumeMounts"
    ),
    "HeadGroupSpec": fields("headService enableIngress rayStartParams serviceType", template="PodTemplate"),
    "WorkerGroupSpec": fields(
        "suspend groupName replicas minReplicas maxReplicas numOfHosts idleTimeoutSeconds rayStartParams "
        "scaleStrategy",
        template="PodTemplate",
    ),
    "RayJobSpec": fields(
        "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
        "submitterConfig managedBy deletionStrategy entrypoint jobId runtimeEnvYAML submissionMode "
        "entrypointResources entrypointNumCpus entrypointNumGpus suspend ttlSecondsAfterFinished "
        "shutdownAfterJobFinishes schedule"
    ),
    "PodTemplate": fields("", metadata="Meta", spec="PodSpec"),
    "PodSpec": fields(
        "serviceAccountName restartPolicy terminationGracePeriodSeconds volumes nodeSelector tolerations "
        "affinity",
        containers="Container",
    ),
    "Container": fields(
        "name image command args env envFrom volumeMounts",
        ports="Port",
        resources="Resources",
        lifecycle="Lifecycle",
    ),
    "Port": fields("name containerPort protocol"),
    "Resources": fields("limits requests claims"),
    "Lifecycle": fields("preStop postStart"),
}


def unknown_fields(value, kind, path):
    """The paths of the fields that a type does not have."""
    if isinstance(value, list):
        return [bad for n, item in enumerate(value) for bad in unknown_fields(item, kind, f"{path}[{n}]")]
    found = []
    for key, item in value.items():
        if key not in FIELDS[kind]:
            found.append(f"{path}.{key}")
        elif FIELDS[kind][key]:
            found += unknown_fields(item, FIELDS[kind][key], f"{path}.{key}")
    return found


@pytest.fixture(scope="module")
def manifest():
    return lambda name: yaml.safe_load((ROOT / "kuberay" / name).read_text())


@pytest.fixture(scope="module")
def pods(manifest):
    """The container of the head and of each worker group, by name."""
    spec = manifest("raycluster.yaml")["spec"]
    groups = {"head": spec["headGroupSpec"]} | {
        group["groupName"]: group for group in spec["workerGroupSpecs"]
    }
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_all_fields_exist(manifest, name):
    found = manifest(name)
    assert found["apiVersion"] == "ray.io/v1"
    assert unknown_fields(found, found["kind"], found["kind"]) == []


def test_a_field_that_does_not_exist_is_found():
    wrong = {"spec": {"workerGroupSpecs": [{"groupName": "a", "maxReplica": 1}]}}
    assert unknown_fields(wrong, "RayCluster", "RayCluster") == [
        "RayCluster.spec.workerGroupSpecs[0].maxReplica"
    ]


def test_the_node_types_are_those_of_the_cluster_on_aws(manifest, pods):
    aws = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    spec = manifest("raycluster.yaml")["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == str(aws.pop("head")["resources"]["CPU"])
    groups = {group["groupName"].replace("-", "_"): group for group in spec["workerGroupSpecs"]}
    assert list(groups) == list(aws)
    for name, kind in aws.items():
        assert (groups[name]["minReplicas"], groups[name]["maxReplicas"]) == (
            kind["min_workers"],
            kind["max_workers"],
        )
        limits = pods[name.replace("_", "-")]["resources"]["limits"]
        assert float(limits["cpu"]) == kind["resources"]["CPU"]
        assert float(limits.get("nvidia.com/gpu", 0)) == kind["resources"].get("GPU", 0)


def test_it_is_closed_and_of_the_installed_ray(manifest, pods):
    spec = manifest("raycluster.yaml")["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"  # not reachable from outside
    assert spec["rayVersion"].rpartition(".")[0] == version("ray").rpartition(".")[0]
    assert {pod["image"] for pod in pods.values()} == {f"REGISTRY/dpt_ray:{version('dpt_ray')}"}


def test_a_pod_that_stops_is_drained_first_as_the_watcher_of_spot_notices_does(manifest, pods):
    from dpt_ray.cluster.spot import drain_command

    for group in manifest("raycluster.yaml")["spec"]["workerGroupSpecs"]:
        pod = pods[group["groupName"]]
        shell = pod["lifecycle"]["preStop"]["exec"]["command"][-1]
        words = shlex.split(shell.partition(";")[0])
        watcher = drain_command("$FQ_RAY_IP:6379", 100)
        assert words[0] == "ray"
        assert {word for word in words if word[0] == "-"} == {word for word in watcher[3:] if word[0] == "-"}
        waits = int(shell.rpartition("sleep ")[2])
        assert waits < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_the_job_runs_a_configuration_that_the_image_has(manifest):
    words = shlex.split(manifest("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["dpt", "run"]
    path = words[2].removeprefix("/home/ray/dpt_ray/configs/")
    config = load_config(CONFIGS / path, words[3:])
    assert isinstance(config, Config) and config.compute.autoscaling
    assert f"WORKDIR {words[2].removesuffix(f'/configs/{path}')}\n" in (ROOT / "Dockerfile").read_text()


def test_what_the_image_copies_is_there_and_not_ignored():
    allowed = {
        line[1:].removesuffix("/**")
        for line in (ROOT / ".dockerignore").read_text().split()
        if line[0] == "!"
    }
    copies = [
        line.split()[1:-1]
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
    ]
    for source in (source for sources in copies for source in sources):
        assert (ROOT / source).exists() and source in allowed, source
