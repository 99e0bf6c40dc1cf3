"""A student: what it learns from, what is published, and how it is measured, exported and used."""

import json

import numpy as np
import onnxruntime
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file

from dpt_ray.cluster import training
from dpt_ray.commands import predict
from dpt_ray.commands.export import ONNX_FILE, export_model
from dpt_ray.config import ConfigError
from dpt_ray.data import training_images
from dpt_ray.data.rows import RealRows
from dpt_ray.data.shards import read_features
from dpt_ray.data.units import read_index
from dpt_ray.learners.linear_classifier import load_classifier, logits
from dpt_ray.models.encoder import load_encoder
from dpt_ray.stages import student
from tests.helpers.paths import DIGITS
from tests.helpers.runs import check_two_workers, make

TINY = (
    "student={network: small_conv, width: 8, dim: 16, steps: 6, batch_size: 32, learning_rate: 1e-2}",
    "student.checkpoint_every=2",
    "student.ema_decay=0.5",
    "student.views=digits",
)


def distilled(finished, folder, *changes):
    """The finished run with a student besides, in a folder of its own."""
    return finished.copy_to(folder, *TINY, *changes)


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    found = distilled(finished, tmp_path_factory.mktemp("student"))
    return found, set(make(found.config))


def evaluation(found):
    return json.loads((found.output / "runs" / "digits" / "evaluation.json").read_text())


def test_a_student_is_made_beside_all_that_was_there(run):
    _, made = run
    assert made == {"student", "student_features", "student_classifier", "evaluation", "report"}


def test_the_targets_are_the_teachers_calibrated_probabilities_of_all_training_images(run, monkeypatch):
    found, _ = run
    node, seen = found.nodes()["student"], {}
    task = type("Task", (), {})()
    task.name, task.settings = "student", node.settings.model_copy(update={"temperature": 0.5})
    task.inputs = {key: found.artifact(source.name) for key, source in node.inputs.items()}
    monkeypatch.setattr(training, "fit", lambda task, worker, workload: seen.update(workload=workload))
    student.train(task, training_worker())
    load, rows = seen["workload"].load_batch, np.arange(seen["workload"].n_rows)
    given = load(rows, 0)

    index = read_index(found.artifact("index"))
    train = index.filter(pc.equal(index["split"], "train"))
    assert len(rows) == train.num_rows
    ids, raw = read_features(found.artifact("features"))
    f = raw[pc.index_in(train["id"].combine_chunks(), ids).to_numpy()]
    r = (f - f.mean(1, keepdims=True)) / np.linalg.norm(f - f.mean(1, keepdims=True), axis=1, keepdims=True)
    real = RealRows(found.artifact("index"), found.artifact("features"), ("validation",)).validation
    W = load_classifier(found.artifact("retrained"))
    T = fitted_temperature(logits(real.features, W), real.labels)
    expected = torch.from_numpy(r @ W.T / (0.5 * T)).softmax(1)
    torch.testing.assert_close(given["target"], expected.float(), rtol=1e-3, atol=1e-5)


def training_worker():
    from dpt_ray.training.workload import Worker

    return Worker()


def fitted_temperature(decisions, labels):
    from dpt_ray.evaluation.calibration import fit_temperature

    return fit_temperature(torch.from_numpy(decisions), torch.from_numpy(labels))


def test_the_published_classifier_is_of_the_published_encoders_features(run):
    found, _ = run
    trained = found.artifact("student")
    assert load_encoder(trained.uri).dim == 16
    real = RealRows(found.artifact("index"), found.artifact("student_features"), ("validation",)).validation
    W = load_classifier(trained, "classifier/")
    manifest = found.artifact("student_classifier").manifest
    right = (logits(real.features, W).argmax(1) == real.labels).mean()
    assert manifest["validation_top1"] == pytest.approx(right)
    expected = fitted_temperature(logits(real.features, W), real.labels)
    assert manifest["calibration"]["temperature"] == pytest.approx(expected)
    assert trained.read_json("classifier/config.json")["teacher"] == "dpt_paper"


def test_results_compare_the_student_with_its_teacher(run):
    found, _ = run
    result = evaluation(found)
    rows = {row["method"]: row for row in result["accuracy"]}
    assert rows["student"]["note"] == "distillation, 6 steps"
    compared = result["student"]
    assert compared["teacher"] == "dpt_paper"
    hits = []
    for features, classifier in (("features", "retrained"), ("student_features", "student_classifier")):
        real = RealRows(found.artifact("index"), found.artifact(features), ("test",)).of_split("test")
        W = load_classifier(found.artifact(classifier))
        hits.append((logits(real.features, W).argmax(1) == real.labels).astype(float))
    difference = hits[1] - hits[0]
    assert compared["gain"]["gain"] == pytest.approx(difference.mean())
    assert compared["gain"]["stderr"] == pytest.approx(difference.std(ddof=1) / np.sqrt(len(difference)))
    assert compared["gain"]["gain"] == pytest.approx(rows["student"]["test"] - rows["dpt_paper"]["test"])
    for key, name, dim in (("parameters", "student", 16), ("teacher_parameters", "encoder", 64)):
        weights = load_file(found.artifact(name).local_file("model.safetensors"))
        assert compared[key] == sum(value.numel() for value in weights.values()) + 10 * dim
    assert compared["flops"] < compared["teacher_flops"]
    # The headline is what it is without a student.
    assert result["gain"]["improved"] == "dpt"


def test_the_report_says_how_the_student_compares(run):
    found, _ = run
    text = (found.output / "runs" / "digits" / "report.html").read_text()
    compared = evaluation(found)["student"]
    assert "Student, distilled for serving" in text and "Student loss" in text
    assert f"it has {compared['parameters']:,} parameters" in text
    assert f"{100 * compared['gain']['gain']:+.1f} ± {100 * compared['gain']['stderr']:.1f} points" in text
    assert (found.output / "runs" / "digits" / "student" / "classifier").is_dir()


def test_the_ladders_best_rung_is_named_as_the_teacher(run, tmp_path):
    found, _ = run
    changes = ("ladder={rungs: [tuned_probe]}", "student.teacher=best", "evaluate.controls=false")
    other = found.copy_to(tmp_path / "best", *changes)
    make(other.config, "student_classifier", "evaluation")
    best = other.artifact("best").manifest["best"]
    assert evaluation(other)["student"]["teacher"] == best in ("probe", "tuned_probe")


def test_a_killed_training_continues_to_the_same_weights(run, tmp_path, monkeypatch):
    found, _ = run
    undisturbed, cut = (found.copy_to(tmp_path / name, "student.seed=1") for name in "ab")
    make(undisturbed.config, "student")
    real = training.save_checkpoint

    def save_and_die(out, step, *rest):
        real(out, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", save_and_die)
        make(cut.config, "student")
    make(cut.config, "student")
    one, other = (run.payloads("student")["model.safetensors"] for run in (undisturbed, cut))
    assert one == other


def test_two_workers_train_the_weights_of_one_up_to_rounding(run, tmp_path):
    found, _ = run
    check_two_workers(found, tmp_path, "student", "student.seed=3", "student.learning_rate=1e-3")


def test_images_that_do_not_fit_are_read_from_their_files(run, tmp_path, monkeypatch):
    found, _ = run
    held, read = (found.copy_to(tmp_path / name, "student.seed=2") for name in ("held", "read"))
    make(held.config, "student")
    with monkeypatch.context() as patch:
        patch.setattr(training_images, "fits_memory", lambda rows, size, mode: False)
        make(read.config, "student")
    one, other = (run.payloads("student")["model.safetensors"] for run in (held, read))
    assert one == other


def test_images_known_to_be_unreadable_are_left_out_of_those_that_are_read(run, monkeypatch):
    found, _ = run
    monkeypatch.setattr(training_images, "fits_memory", lambda rows, size, mode: False)
    index = found.artifact("index")
    how = student.Crop("adm", 8)
    ids, _ = training_images.training_images(index, how, 0.0)
    fewer, images = training_images.training_images(index, how, 0.0, ids[:3].to_pylist())
    assert fewer.to_pylist() == ids[3:].to_pylist() and len(images) == len(fewer)


def test_the_student_is_exported_and_predicts_by_its_name(run, tmp_path):
    found, _ = run
    count = export_model(found.config, "onnx", tmp_path / "onnx", "student")
    facts = json.loads((tmp_path / "onnx" / "config.json").read_text())
    assert facts["method"] == "student" and count == evaluation(found)["student"]["parameters"]
    labeller = predict.load_labeller(found.config, "student")
    assert labeller.choice.encoder == "student" and labeller.encoder.dim == 16
    manifest = found.artifact("student_classifier").manifest
    assert facts["temperature"] == labeller.temperature == manifest["calibration"]["temperature"]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / ONNX_FILE))
    [probabilities] = session.run(["probabilities"], {"pixels": pixels})
    np.testing.assert_allclose(probabilities, labeller(pixels), rtol=1e-3, atol=1e-5)
    export_model(found.config, "classifier", tmp_path / "classifier", "student")
    assert load_encoder(tmp_path / "classifier" / "encoder").dim == 16
    with pytest.raises(
        ConfigError, match=r"--method student: is of the formats classifier and onnx, not saf"
    ):
        export_model(found.config, "safetensors", tmp_path / "denoiser", "student")


def test_plan_status_and_until_know_the_student(run, dpt):
    found, _ = run
    overrides = [*found.overrides, f"output={found.output}"]
    for command in ("plan", "status"):
        code, out, _ = dpt(command, DIGITS, *overrides)
        assert code == 0 and "student_classifier" in out.replace("student classifier", "student_classifier")
    code, out, _ = dpt("run", DIGITS, *overrides, "--until", "student_classifier")
    assert code == 0 and "Nothing to do" in out


def test_a_teacher_that_was_not_calibrated_is_told(run, tmp_path, caplog):
    found, _ = run
    node = found.nodes()["student"]
    task = type("Task", (), {})()
    task.name, task.settings = "student", node.settings
    task.inputs = {key: found.artifact(source.name) for key, source in node.inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "_calibration", lambda task: {"temperature": 1.0, "n": 0})
        patch.setattr(training, "run", lambda task, function: {})
        facts = student.Student.make(task)
    assert "the confidences of retrained could not be calibrated" in caplog.text
    assert facts["rows"] == 997 and facts["labelled"] == 0
