"""What Prometheus sees of a training: its gauges at the metrics port of the node that it runs on."""

import re
import time
import urllib.request

from dpt_ray.store.artifact import Artifact

RECORD = {"step": 1, "loss": 0.25, "images_per_s": 20.0, "data_wait": 0.125, "lr": 1.0}


def test_the_gauges_of_a_training_are_at_the_nodes_metrics_port(cluster, tmp_path):
    import ray

    ray.init(address=cluster.address, ignore_reinit_error=True, log_to_driver=False)

    @ray.remote(num_cpus=0.5)
    class Worker:
        def log(self, folder):
            from dpt_ray.cluster.gauges import ray_gauges
            from dpt_ray.training.log import TrainingLog

            self.log = TrainingLog(Artifact(folder), 0, ray_gauges("by hand"))
            self.log.add(RECORD)

    worker = Worker.remote()
    ray.get(worker.log.remote(str(tmp_path)))
    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    found, end = {}, time.monotonic() + 60
    while len(found) < 3 and time.monotonic() < end:
        text = urllib.request.urlopen(url).read().decode()
        lines = re.findall(r'^ray_dpt_training_(\w+)\{[^}]*stage="by hand"[^}]*\} (\S+)$', text, re.M)
        found = {name: float(value) for name, value in lines}
        time.sleep(0.5)
    assert found == {"loss": 0.25, "images_per_s": 20.0, "data_wait": 0.125}
    ray.kill(worker)
