"""What Prometheus and Grafana see of a run."""

import json
import re
import time
import urllib.request

import pytest
import yaml

from dpt_ray.cluster.gauges import METRICS, StageGauges
from dpt_ray.engine.progress import repeating
from dpt_ray.training.log import read_log
from tests.helpers.paths import ROOT

MONITORING = ROOT / "monitoring"
SAMPLE = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.M)


class Scraper:
    """Scrapes the metrics port of the first node every half second, as Prometheus would less often."""

    def __init__(self):
        import ray

        self.url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
        self.latest = {}

    def scrape(self):
        text = urllib.request.urlopen(self.url).read().decode()
        for name, tags, value in SAMPLE.findall(text):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', tags))
            self.latest[name, tags.get("run"), tags.get("stage")] = float(value)

    def names(self):
        return {name for name, *_ in self.latest}


def test_each_metric_of_the_dashboard_is_exported_by_a_run(finished, tmp_path):
    run = finished.copy_to(tmp_path, without=("features", "moments", "denoiser", "samples"))
    scraper, shown = Scraper(), set(re.findall(r"ray_\w+", (MONITORING / "grafana.json").read_text()))
    assert {f"ray_{metric}" for metric, _ in METRICS.values()} <= shown
    with repeating(scraper.scrape, 0.5):
        run.make("samples")
        images, last = run.artifact("index").manifest["rows"], read_log(run.artifact("denoiser"))[-1]
        expected = {
            ("done", "extract images"): images,
            ("total", "extract images"): images,
            ("seconds_left", "extract images"): 0,
            ("unreadable", "extract images"): 0,
            ("done", "denoiser"): last["step"],
            **{(key, "denoiser"): last[key] for key in ("loss", "images_per_s", "mfu", "data_wait")},
        }
        wanted = {
            (f"ray_{METRICS[key][0]}", "digits", stage): value for (key, stage), value in expected.items()
        }
        end = time.monotonic() + 40
        while not wanted.items() <= scraper.latest.items() and time.monotonic() < end:
            time.sleep(0.5)
    assert shown <= scraper.names(), shown - scraper.names()
    assert {key: scraper.latest.get(key) for key in wanted} == wanted


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


@pytest.mark.parametrize(("joined", "numbers"), [(False, {"done": 1.0}), (True, {"loss": float("nan")})])
def test_nothing_is_shown_without_a_cluster_nor_what_is_not_finite(joined, numbers, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: joined)
    monkeypatch.setattr("dpt_ray.cluster.gauges._gauge", lambda name: pytest.fail(name))
    StageGauges("run")("stage", numbers)
