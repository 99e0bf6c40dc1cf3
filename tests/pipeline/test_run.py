"""A run end to end: what it makes, and what it does not make again."""

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.rows import RealRows
from dpt_ray.engine.errors import StageError
from dpt_ray.evaluation.methods import METHODS
from dpt_ray.pipeline import run
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run_folder import node_references, references
from dpt_ray.store.artifact import Store
from dpt_ray.training.log import read_log
from tests.helpers.paths import GOLDEN
from tests.helpers.runs import make
from tests.helpers.tiny_run import files, shard_files


@pytest.mark.smoke
def test_a_run_publishes_every_artifact_and_shows_the_report(finished):
    unpublished = [name for name in finished.nodes() if not finished.artifact(name).published]
    assert unpublished == []
    shown = finished.output / "runs" / "digits"
    assert "<html" in (shown / "report.html").read_text()
    for name in ("pseudo_labels.parquet", "evaluation.json", "classifier", "denoiser", "samples"):
        assert (shown / name).exists(), name


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "views"), [("encoder", 2), ("referee", 1)])
def test_an_encoders_training_tells_its_mfu(finished, name, views):
    artifact = finished.artifact(name)
    width, dim = artifact.manifest["settings"]["width"], artifact.manifest["settings"]["dim"]
    # By hand, multiply-adds of one forward pass: stages of 8, 4 and 2 pixels with 1, 2 and 4 widths.
    sizes = ((64, 1, 1, 0), (16, 1, 2, 1), (4, 2, 4, 1))  # pixels, widths in and out, a skip's convolution
    convolutions = 9 * 64 * width + sum(
        pixels * width**2 * (9 * a * b + 9 * b * b + skip * a * b) for pixels, a, b, skip in sizes
    )
    head = dim * dim + dim * dim // 2 if name == "encoder" else dim * 10
    forward = 2 * (convolutions + 4 * width * dim + head)
    peak = artifact.read_json("started.json")["matmul_flops_per_s"]
    for record in read_log(artifact):
        assert record["mfu"] == pytest.approx(3 * views * forward * record["images_per_s"] / peak)


@pytest.mark.smoke
def test_the_tuned_probe_is_the_one_that_validation_prefers(finished):
    real = RealRows(finished.artifact("index"), finished.artifact("features"), ("validation", "test"))
    with_labels = RealRows(*map(finished.artifact, ("index", "features")), (), finished.artifact("labels"))
    labelled, test = with_labels.labelled(finished.artifact("labels")), real.of_split("test")
    found = []
    for l2 in (2.5e-3, 2.5e-4, 2.5e-5, 2.5e-6):
        # scikit-learn minimises C sum CE + ||W||^2 / 2: ours with C = 1 / l2.
        fit = LogisticRegression(C=1 / l2, fit_intercept=False, tol=1e-9, max_iter=10_000)
        fit.fit(labelled.features, labelled.labels)
        rows = real.validation
        loss = log_loss(rows.labels, fit.predict_proba(rows.features), labels=fit.classes_)
        hits = [fit.score(rows.features, rows.labels) for rows in (real.validation, test)]
        found.append((-hits[0], loss, l2, hits[1]))
    validation, _, l2, tested = min(found)
    evaluation = finished.artifact("evaluation").manifest["result"]
    row = evaluation["accuracy"][1]
    assert (row["method"], row["note"]) == ("tuned_probe", f"labels only, l2 {l2:g}")
    # An image on a border may fall to either side.
    assert row["validation"] == pytest.approx(-validation, abs=0.006)
    assert row["test"] == pytest.approx(tested, abs=0.004)
    dpt = evaluation["accuracy"][-1]
    gain = evaluation["gain"]
    assert (gain["baseline"], gain["improved"]) == ("tuned_probe", dpt["method"])
    assert gain["gain"] == pytest.approx(dpt["test"] - row["test"])
    assert METHODS["tuned_probe"].name in (finished.output / "runs" / "digits" / "report.html").read_text()


@pytest.mark.smoke
def test_the_same_run_again_makes_nothing(finished, tmp_path):
    run = finished.copy_to(tmp_path)
    before = files(tmp_path / "store")
    assert run.make("report") == []
    assert files(tmp_path / "store") == before


def test_a_changed_setting_redoes_only_what_depends_on_it(finished, tmp_path):
    run = finished.copy_to(tmp_path, "retrain.l2=0.01")
    before = files(tmp_path / "store")
    assert run.make("report") == ["retrained", "evaluation", "report"]
    after = files(tmp_path / "store")
    assert {path: after[path] for path in before} == before


def test_more_images_per_class_add_shards_and_rewrite_none(finished, tmp_path):
    few = finished.copy_to(tmp_path)
    many = replace(few, overrides=(*few.overrides, "generate.images_per_class=48"))
    made = ("samples", "sample_features")
    old = {name: shard_files(few.artifact(name)) for name in made}
    manifests = {name: few.artifact(name).manifest for name in made}
    assert set(many.make("sample_features")) == set(made)
    for name in made:
        new = shard_files(many.artifact(name))
        assert {key: new[key] for key in old[name]} == old[name], name
        assert (len(old[name]), len(new)) == (4, 6)  # of 8 images of each class
        assert many.artifact(name).manifest["rows"] == 480
        assert few.artifact(name).manifest == manifests[name]


def test_two_processes_with_the_same_run_share_the_work(finished, tmp_path):
    run = finished.copy_to(tmp_path, "diffusion.steps=200", "diffusion.checkpoint_every=200")
    both = [run.start("train-diffusion"), run.start("train-diffusion")]
    ends = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    waited = ["another run is making this" in error for _, error in ends]
    idle = ["Nothing to do" in out for out, _ in ends]
    assert sorted(waited) == [False, True], ends
    assert idle == waited
    assert run.artifact("denoiser").published


def test_too_many_training_workers_are_refused_before_any_work_but_labels(tmp_path, monkeypatch):
    checked = []

    def refuse(compute):
        checked.append(compute.train_workers)
        raise ConfigError("compute.train_workers: no room")

    monkeypatch.setattr(run, "connect", lambda compute: 0.0)
    monkeypatch.setattr(run, "check_training", refuse)
    config = load_config("configs/digits.yaml", [f"output={tmp_path}"])
    make(config, "labels")  # nothing is trained for them
    assert not checked
    with pytest.raises(ConfigError, match="no room"):
        make(config, "features")
    assert checked == [1]
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"index", "labels"}


@pytest.fixture
def unconnected(monkeypatch):
    """No cluster is joined, and none is missed."""
    monkeypatch.setattr(run, "connect", lambda compute: 0.0)
    monkeypatch.setattr(run, "check_training", lambda compute: None)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("overrides", [(), ("generate_in=both",)])
def test_initial_weights_of_another_network_are_refused_before_any_training(tmp_path, overrides):
    torch.save({"pos_embed": torch.zeros(1, 2, 3)}, tmp_path / "other.pth")
    overrides = [f"output={tmp_path}", f"diffusion.init_from={tmp_path}/other.pth", *overrides]
    with pytest.raises(ConfigError, match=r"^diffusion\.init_from: .*other\.pth") as caught:
        make(load_config("configs/digits.yaml", overrides), "report")
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "store").iterdir()} <= {"index", "labels", "autoencoder"}


@pytest.mark.usefixtures("unconnected")
def test_patches_that_do_not_divide_the_latents_are_refused_before_any_training(tmp_path):
    kl = f"autoencoder={{kind: kl, weights: {GOLDEN}/autoencoder_kl.pth}}"
    overrides = ["data.mode=RGB", "data.image_size=24", kl, "diffusion.model.patch_size=5"]
    config = load_config("configs/digits.yaml", [f"output={tmp_path}", *overrides])
    with pytest.raises(ConfigError, match=r"^diffusion\.model\.patch_size: 5 does not divide the side"):
        make(config, "report")
    assert {path.name for path in (tmp_path / "store").iterdir()} <= {"index", "labels", "autoencoder"}


@pytest.mark.usefixtures("unconnected")
def test_more_measured_images_of_a_class_than_are_generated_are_refused_before_any_work(tmp_path):
    (tmp_path / "inception.pth").write_bytes(b"weights")
    measured = [f"evaluate.inception={tmp_path}/inception.pth", "evaluate.labels=uniform"]
    settings = [f"output={tmp_path}", *measured, "evaluate.images=1280"]
    with pytest.raises(ConfigError, match=r"uniform draws up to 1\d\d images of a class, not 128: set "):
        make(load_config("configs/digits.yaml", settings), "report")
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"index"}


def test_what_an_interrupted_run_has_begun_stays_in_use_when_a_part_of_it_runs_again(tmp_path):
    config = load_config("configs/digits.yaml", [f"output={tmp_path}"])
    store, denoiser = Store(str(tmp_path)), flow(config)["denoiser"]
    # A run that was stopped amid its denoiser leaves its plan and a checkpoint.
    store.run_folder("digits").write_json("planned.json", node_references({"denoiser": denoiser}))
    denoiser.artifact(store).write_bytes("checkpoints/000000100.json", b"{}")
    make(config, "labels")
    assert references(store)[f"denoiser/{denoiser.digest}"] == ["digits"]


def test_an_output_that_fails_beside_the_stages_is_one_line(tmp_path):
    config = load_config("configs/digits.yaml", [f"output={tmp_path}"])
    (tmp_path / "runs").write_text("in the way of the folder")
    with pytest.raises(StageError, match=r"^output: .*runs") as caught:
        make(config, "labels")
    assert "\n" not in str(caught.value)
