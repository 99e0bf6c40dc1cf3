"""FID and its like, measured by a run on its images, against independent computations on the same files."""

import io
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.kid import poly_mmd
from typer.testing import CliRunner

from dpt_ray.cli import app
from dpt_ray.commands.export import export_model
from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.shards import read_images
from dpt_ray.evaluation.label_draw import images_of_each_class
from dpt_ray.evaluation.merged import read_statistics
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.status import status
from dpt_ray.stages import inception_statistics as inception
from dpt_ray.store.artifact import Store
from tests.helpers.runs import make
from tests.helpers.tiny_run import shard_files

CLASSES, TEST = ("a", "b", "c"), 8  # test images of each class
CONFIG = """
name: small
data: {{source: folder, uri: {images}, image_size: 16}}
labels: {{per_class: 2}}
pretrain: {{steps: 2, batch_size: 8, contrast_group: 8, learning_rate: 1e-3, width: 8, dim: 16}}
diffusion:
  model: {{patch_size: 4, dim: 16, depth: 2, heads: 2}}
  steps: 2
  batch_size: 8
  learning_rate: 1e-3
generate: {{images_per_class: 10, indices_per_shard: 2, nfe: 2}}
retrain: {{images_per_class: 4}}
evaluate: {{controls: false, inception: {weights}}}
compute: {{train_workers: 0, actors: 1, batch_size: 32}}
"""


@dataclass(frozen=True)
class Run:
    """A run of CONFIG below an output folder."""

    path: Path
    output: Path
    overrides: tuple[str, ...] = ()

    @property
    def arguments(self):
        return [str(self.path), f"output={self.output}", *self.overrides]

    @property
    def config(self):
        return load_config(self.path, self.arguments[1:])

    def artifact(self, name):
        return flow(self.config)[name].artifact(Store(str(self.output)))

    def make(self, target):
        return make(self.config, target)

    def rows(self):
        """The image metrics by the first word of their name, and why others are left out."""
        result = json.loads(Path(self.artifact("image_metrics").path("image_metrics.json")).read_text())
        return {row["metric"].split(",")[0]: row for row in result["rows"]}, result["left_out"]

    def copy_to(self, folder, *overrides, without=()):
        shutil.copytree(self.output, folder, symlinks=True)
        copy = replace(self, output=folder)
        for name in without:
            shutil.rmtree(Path(copy.artifact(name).path("")))
        return replace(copy, overrides=(*self.overrides, *overrides))


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory, inception_weights):
    """A run to its report; not to be written to."""
    folder = tmp_path_factory.mktemp("metrics")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", TEST)):
        for label, name in enumerate(CLASSES):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                # Twice as wide as high: what is cut off matters. The first class is the black and white
                # noise that an untrained denoiser makes, so that precision and recall are not 0.
                picture = random.normal(0, 30, (16, 32, 3))
                picture = (
                    100 * picture if label == 0 else np.cumsum(picture, axis=label - 1) + 90 + 30 * label
                )
                image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
                image.save(folder / "images" / split / name / f"{number}.png")
    path = folder / "small.yaml"
    path.write_text(CONFIG.format(images=folder / "images", weights=inception_weights))
    run = Run(path, folder / "output")
    run.make("report")
    return run


@pytest.fixture(scope="module")
def images(finished):
    """(generated, real) test images (n, 16, 16, 3) uint8, read by PIL alone; the generated ones by index."""
    made = {}
    for table in read_images(finished.artifact("samples")):
        for row in table.to_pylist():
            made[row["index"], row["class"]] = np.asarray(Image.open(io.BytesIO(row["image"])))
    folder = finished.path.parent / "images" / "test"
    real = [np.asarray(Image.open(path))[:, 8:24] for path in sorted(folder.rglob("*.png"))]
    return np.stack([made[key] for key in sorted(made)]), np.stack(real)


@pytest.fixture(scope="module")
def features(images, inception_weights):
    """torch-fidelity's (pool, sFID's channels, logits) of the generated and of the real images, float64."""
    network = FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], str(inception_weights))
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: spatial.append(y))
    found = []
    for pixels in images:
        with torch.no_grad():
            pool, logits = network(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        # ADM's evaluator: (B, 17, 17, 192)[..., :7].reshape(B, -1)
        cut = spatial.pop().permute(0, 2, 3, 1)[..., :7].reshape(len(pool), -1)
        found.append((pool.double(), cut.double(), logits))
    return found


def frechet(x, y):
    """Of the features themselves: tr (S_x S_y)^1/2 is the nuclear norm of X Y^T / sqrt((n - 1)(m - 1))."""
    a, b = x - x.mean(0), y - y.mean(0)
    n, m = len(a) - 1, len(b) - 1
    cross = torch.linalg.svdvals(a @ b.T).sum() / (n * m) ** 0.5
    distance = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / n + b.square().sum() / m
    return float(distance - 2 * cross)


def test_metrics_are_those_of_independent_code_on_the_same_images(finished, features):
    (pool, spatial, logits), (real_pool, real_spatial, _) = features
    rows, left_out = finished.rows()
    assert left_out == []
    assert list(rows) == ["FID", "sFID", "KID", "Precision", "Recall", "Inception Score"]
    n, m = 10 * len(CLASSES), TEST * len(CLASSES)
    assert (len(pool), len(real_pool)) == (n, m)
    assert rows["FID"]["value"] == pytest.approx(frechet(pool, real_pool), rel=1e-4)
    assert rows["sFID"]["value"] == pytest.approx(frechet(spatial, real_spatial), rel=1e-4)

    # Equally many of both: the first of each class.
    some = pool[:m]
    both = [rows[name]["value"] for name in ("Precision", "Recall")]
    assert both == pytest.approx(calculate_precision_recall_full(some, real_pool, 3), abs=1e-6)
    assert sum(both) > 0
    # Subsets are unbiased for the estimate from all images.
    kid = rows["KID"]
    assert kid["metric"] == "KID, 100 subsets of 12"
    assert abs(kid["value"] - float(poly_mmd(real_pool, some))) < 4 * kid["spread"] / 10

    # A split holds the images of equal class + index modulo 10.
    number = torch.tensor([label + index for index in range(10) for label in range(len(CLASSES))]) % 10
    by_split = logits[number.argsort(stable=True)]
    isc = isc_features_to_metric(by_split, splits=10, shuffle=False)
    assert rows["Inception Score"]["value"] == pytest.approx(isc["inception_score_mean"], rel=1e-4)
    assert rows["Inception Score"]["spread"] == pytest.approx(isc["inception_score_std"], rel=1e-2)


def test_as_many_images_of_each_class_are_measured_as_random_labels_ask_for(finished, features, tmp_path):
    (pool, _, _), (real_pool, _, _) = features
    run = finished.copy_to(tmp_path / "drawn", "evaluate.images=15", "evaluate.labels=uniform")
    run.make("image_metrics")
    counts = images_of_each_class(15, len(CLASSES), seed=0)
    assert len(set(counts.tolist())) > 1  # balanced labels would be 5 of each
    drawn = [index < counts[label] for index in range(10) for label in range(len(CLASSES))]
    rows, _ = run.rows()
    assert rows["FID"]["n_generated"] == 15
    assert {row["name"] for row in rows.values()} == {"Generated images, labels drawn uniformly at random"}
    assert rows["FID"]["value"] == pytest.approx(frechet(pool[torch.tensor(drawn)], real_pool), rel=1e-4)


def test_every_number_carries_what_it_rests_on(finished, inception_weights):
    from dpt_ray.store.artifact import sha256

    rows, _ = finished.rows()
    extractor = f"Inception-v3 {sha256(inception_weights)[:8]} (not FID's published weights)"
    assert {row["extractor"] for row in rows.values()} == {extractor}
    assert {row["resize"] for row in rows.values()} == {"tensorflow"}
    assert {row["name"] for row in rows.values()} == {"Generated images"}
    counts = {name: (row["n_generated"], row["n_reference"]) for name, row in rows.items()}
    assert counts == {
        **{"FID": (30, 24), "sFID": (30, 24), "KID": (24, 24), "Precision": (24, 24), "Recall": (24, 24)},
        "Inception Score": (30, None),
    }
    assert {row["reference"] for name, row in rows.items() if name != "Inception Score"} == {
        "real test images"
    }


def test_the_page_and_the_commands_show_the_numbers(finished):
    rows, _ = finished.rows()
    page = finished.artifact("report").read_bytes("report.html").decode()
    evaluation = finished.artifact("evaluation").read_json("evaluation.json")
    assert evaluation["image_metrics"]["rows"] == list(rows.values())
    for command in ("measure", "evaluate"):
        result = CliRunner().invoke(app, [command, *finished.arguments], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        assert "Nothing to do" in result.output
        for row in rows.values():
            value = f"{row['value']:.4g}"
            assert value in page and value in result.output, row["metric"]


def test_encoder_features_have_a_frechet_distance_and_its_floor(finished):
    """In memory and at once, against the stage's shard by shard."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    from dpt_ray.data.shards import read_features

    def statistics(artifact, prefix):
        ids, values = read_features(finished.artifact(artifact))
        rows = values[[i.startswith(prefix) for i in ids.to_pylist()]].astype(np.float64)
        return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}, len(rows)

    test, n_test = statistics("features", "test/")
    train, n_train = statistics("features", "train/")
    first = [f"gen-{label:05d}-{index:07d}" for index in range(8) for label in range(len(CLASSES))]
    made, n = statistics("sample_features", tuple(first))
    assert (n_test, n_train, n) == (24, 24, 24)  # as many generated images as training images
    rows = finished.artifact("evaluation").read_json("evaluation.json")["frechet"]
    assert [(row["n_generated"], row["n_reference"]) for row in rows] == [(24, 24), (24, 24)]
    digest = flow(finished.config)["encoder"].digest[:8]
    extractor = f"the run's own encoder ({digest}), DPT's classifier is trained in these features"
    assert {row["extractor"] for row in rows} == {extractor}
    assert {row["resize"] for row in rows} == {"ADM's centre crop 16"}
    for row, found in zip(rows, (made, train), strict=True):
        expected = fid_statistics_to_metric(found, test, False)["frechet_inception_distance"]
        assert row["value"] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_killed_actor_and_other_parts_and_batches_change_rounding_only(
    finished, cluster, tmp_path, monkeypatch
):
    monkeypatch.setattr(inception, "PART", 6)
    made = ("inception_samples", "inception_reference")
    run = finished.copy_to(tmp_path / "run", "compute.batch_size=5", without=made)
    driver = threading.Thread(target=run.make, args=("image_metrics",))
    driver.start()
    end = time.monotonic() + 120
    while not run.artifact(made[0]).shards():
        assert driver.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    [actor] = cluster.pids("InceptionPart")
    os.kill(actor, signal.SIGKILL)
    before = shard_files(run.artifact(made[0]))
    assert not run.artifact(made[0]).published
    driver.join(timeout=240)
    assert not driver.is_alive()
    after = shard_files(run.artifact(made[0]))
    assert {key: after[key] for key in before} == before
    # Shards of the samples are of 6 images; the index has all 24 test images in one unit.
    assert [len(run.artifact(name).listed_shards()) for name in made] == [5, 1]
    for name in made:
        whole, parts = (read_statistics(which.artifact(name)) for which in (finished, run))
        assert whole.count == parts.count
        for one, other in (
            (whole.pool.mean, parts.pool.mean),
            (whole.pool.covariance, parts.pool.covariance),
            (whole.spatial.mean, parts.spatial.mean),
            (whole.spatial.covariance, parts.spatial.covariance),
            (whole.score.class_sums, parts.score.class_sums),
            (whole.kept, parts.kept),
        ):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))
    expected, found = finished.rows()[0], run.rows()[0]
    assert found["FID"]["value"] == pytest.approx(expected["FID"]["value"], rel=1e-4)


def test_a_reference_file_measures_the_same_parts_anew(finished, features, tmp_path):
    (pool, spatial, _), _ = features
    scale = np.linspace(0.5, 2, 2048)
    adm = {"mu": np.ones(2048), "sigma": np.diag(scale**2), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "adm.npz", **adm)
    run = finished.copy_to(tmp_path / "run", f"evaluate.reference={tmp_path / 'adm.npz'}")
    assert run.make("image_metrics") == ["image_metrics"]
    rows, left_out = run.rows()
    assert left_out == []

    def expected(x, mean, deviations):
        """With S_b = diag(s^2), tr (S_a S_b)^1/2 is the nuclear norm of X_a diag(s) / sqrt(n - 1)."""
        a, n = x - x.mean(0), len(x) - 1
        cross = torch.linalg.svdvals(a * deviations).sum() / n**0.5
        return float(
            (x.mean(0) - mean).square().sum() + a.square().sum() / n + (deviations**2).sum() - 2 * cross
        )

    assert rows["FID"]["value"] == pytest.approx(expected(pool, 1, torch.from_numpy(scale)), rel=1e-4)
    assert rows["sFID"]["value"] == pytest.approx(
        expected(spatial, 0, torch.ones(2023, dtype=torch.float64)), rel=1e-4
    )
    assert [(rows[key]["reference"], rows[key]["n_reference"]) for key in ("FID", "sFID", "KID")] == [
        ("adm.npz", None), ("adm.npz", None), ("real test images", 24)
    ]  # fmt: skip

    np.savez(tmp_path / "clean.npz", mu=adm["mu"], sigma=adm["sigma"])
    other = replace(run, overrides=(f"evaluate.reference={tmp_path / 'clean.npz'}",))
    assert other.make("image_metrics") == ["image_metrics"]
    again, left_out = other.rows()
    assert again["FID"]["value"] == rows["FID"]["value"]
    assert "sFID" not in again
    assert left_out == ["sFID needs mu_s and sigma_s, which clean.npz has not"]


def test_without_the_file_it_is_said_which_one_and_where_it_goes(finished, tmp_path):
    run = finished.copy_to(tmp_path / "run", "evaluate.inception=")
    with pytest.raises(ConfigError, match=r"no image metrics stage: .*pt_inception.*evaluate\.inception"):
        run.make("image_metrics")
    assert run.make("report") == ["evaluation", "report"]
    page = run.artifact("report").read_bytes("report.html").decode()
    assert "Not computed: FID, sFID, Inception Score, KID, precision and recall are not computed" in page
    assert "pt_inception-2015-12-05-6726825d.pth" in page and "evaluate.inception" in page


def test_a_file_of_another_network_ends_the_run_before_anything_is_trained(finished, tmp_path):
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "other.pth")
    run = replace(finished, output=tmp_path / "new", overrides=(f"evaluate.inception={tmp_path}/other.pth",))
    with pytest.raises(ConfigError, match=r"inception: .*other\.pth: not the weights of FID's Inception"):
        run.make("image_metrics")
    assert not run.artifact("denoiser").published


def test_a_published_denoiser_is_measured_without_encoder_or_training_images(finished, tmp_path):
    export_model(finished.config, "nnet_ema", tmp_path / "weights")
    images = tmp_path / "images"
    shutil.copytree(finished.path.parent / "images" / "test", images / "test")
    given = (f"diffusion.weights={tmp_path / 'weights'}", "diffusion.condition=true_labels")
    given += (f"data.uri={images}", "encoder.kind=msn", "encoder.weights=/none.pth", "pretrain=")
    run = replace(finished, output=tmp_path / "output", overrides=given)
    made = run.make("image_metrics")
    assert "image_metrics" in made and not {"labels", "encoder", "features", "moments"} & set(made)
    expected, (rows, _) = finished.rows()[0], run.rows()
    assert [row["n_reference"] for row in rows.values()] == [row["n_reference"] for row in expected.values()]
    with pytest.raises(ConfigError, match=r"^encoder\.weights: /none\.pth: no such file"):
        run.make("report")
    rows = {row.name: row for row in status(run.config)}
    assert rows["image_metrics"].manifest and not rows["encoder"].manifest
    assert rows["encoder"].why.startswith("encoder.weights: /none.pth")
    assert rows["probe"].why.startswith("waits for features")
