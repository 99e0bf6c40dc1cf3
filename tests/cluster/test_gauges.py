"""What Prometheus and Grafana see of a run."""

import json
import re
import time
import urllib.request

import yaml

from dpt_ray.cluster.gauges import METRICS, StageGauges
from dpt_ray.training.log import read_log
from tests.helpers.paths import ROOT

MONITORING = ROOT / "monitoring"
SAMPLE = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.M)


def exported(enough):
    """The samples at the metrics port of the first node, once there are enough: {name: [(tags, value)]}."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    end = time.monotonic() + 60
    while True:
        found = {}
        for name, tags, value in SAMPLE.findall(urllib.request.urlopen(url).read().decode()):
            found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)))
        if enough(found) or time.monotonic() > end:
            return found
        time.sleep(1)


def of_stage(found, name, stage):
    """The value of a stage's metric in the run `digits`."""
    wanted = {"run": "digits", "stage": stage}
    return next(value for tags, value in found[name] if tags.items() >= wanted.items())


def test_each_metric_of_the_dashboard_is_exported_by_a_run(finished, tmp_path):
    run = finished.copy_to(tmp_path, without=("features", "moments", "denoiser", "samples"))
    run.make("samples")
    shown = set(re.findall(r"ray_\w+", (MONITORING / "grafana.json").read_text()))
    assert {f"ray_{metric}" for metric, _ in METRICS.values()} <= shown
    found = exported(lambda found: shown <= found.keys())
    assert shown <= found.keys(), shown - found.keys()
    images = run.artifact("index").manifest["rows"]
    assert of_stage(found, "ray_dpt_stage_done", "extract") == images
    assert of_stage(found, "ray_dpt_stage_total", "extract") == images
    assert of_stage(found, "ray_dpt_stage_seconds_left", "extract") == 0
    assert of_stage(found, "ray_dpt_stage_unreadable", "extract") == 0
    last = read_log(run.artifact("denoiser"))[-1]
    assert of_stage(found, "ray_dpt_stage_done", "denoiser") == last["step"]
    for metric, key in (("loss", "loss"), ("images_per_s", "images_per_s"), ("mfu", "mfu")):
        assert of_stage(found, f"ray_dpt_training_{metric}", "denoiser") == last[key]


def test_the_dashboard_is_what_grafana_imports():
    """Field names by Grafana's JSON model: grafana.com/docs, "Dashboard JSON model"."""
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    assert dashboard["uid"] and dashboard["schemaVersion"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
        assert panel["datasource"]["uid"] == "${datasource}"
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_prometheus_reads_the_file_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    (files,) = job["file_sd_configs"]
    assert files["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_nothing_is_shown_where_no_cluster_is_joined(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    gauges = StageGauges("run")
    gauges("stage", {"done": 1.0})
    assert gauges._gauges == {}


def test_a_number_that_is_not_finite_is_not_shown(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    gauges = StageGauges("run")
    gauges("stage", {"loss": float("nan")})
    assert gauges._gauges == {}
