"""Learners that train the encoder: what they start from, what they train on, and what is published."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.cluster import training
from dpt_ray.commands import best_classifier, predict
from dpt_ray.config import ConfigError, load_config
from dpt_ray.data import training_images
from dpt_ray.data.crops import Crop
from dpt_ray.data.decoded import iterate_pixels
from dpt_ray.data.raw_images import RawImages
from dpt_ray.data.rows import RealRows, row_normalise
from dpt_ray.data.sources import INDEXERS
from dpt_ray.learners.fine_tuned import FineTuned
from dpt_ray.learners.linear_classifier import load_classifier, logits
from dpt_ray.models.encoder import Encoder, load_encoder
from dpt_ray.models.encoder_spec import EncoderSpec
from dpt_ray.models.msn import MsnVit
from dpt_ray.stages import learner
from dpt_ray.stages.learner import Labelled, _images, _student
from tests.helpers.images import encoded
from tests.helpers.paths import DIGITS
from tests.helpers.runs import check_two_workers, make

TINY = (
    "semi_supervised={steps: 6, batch_size: 16, group: 8, unlabelled_ratio: 2, learning_rate: 1e-3}",
    "semi_supervised.checkpoint_every=2",
    "semi_supervised.ema_decay=0.5",
)
METHODS = ("supervised", "freematch", "semi_vit")


def learning(finished, folder, method, *changes):
    """The finished run with a learner besides, in a folder of its own."""
    return finished.copy_to(folder, f"classifier.learner={method}", *TINY, *changes)


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    found = learning(finished, tmp_path_factory.mktemp("learner"), "freematch")
    return found, set(make(found.config))


def test_a_learner_is_made_beside_what_the_linear_route_has(run):
    _, made = run
    both = {f"{name}{part}" for name in ("learner", "retrained_learner") for part in ("", "_features")}
    both |= {"learner_classifier", "retrained_learner_classifier", "learner_labels"}
    # Stage 2 trains on the learner's labels; what it makes from there on is new.
    assert made >= both | {"denoiser", "samples", "evaluation", "report"}
    assert not made & {"encoder", "features", "moments", "classifier", "pseudo_labels", "probe"}


def test_the_classifier_and_the_features_are_what_the_network_computes(run):
    """The published pair gives the logits of the trained network, by an implementation of its own."""
    found, _ = run
    trained, index = found.artifact("learner"), found.artifact("index")
    encoder = load_encoder(trained.uri)
    W = load_classifier(trained, "classifier/")
    student = FineTuned(load_encoder(trained.uri), W)
    images = torch.randint(0, 256, (5, 8, 8, 1), dtype=torch.uint8)
    with torch.no_grad():
        f = encoder(images)
        row = (f - f.mean(1, keepdim=True)) / (f - f.mean(1, keepdim=True)).norm(dim=1, keepdim=True)
        expected = row @ torch.from_numpy(W).T
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        torch.testing.assert_close(student(pixels), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(student.weights, W, rtol=1e-5)
    real = RealRows(index, found.artifact("learner_features"), ("validation",))
    right = (logits(real.validation.features, W).argmax(1) == real.validation.labels).mean()
    assert found.artifact("learner_classifier").manifest["validation_top1"] == pytest.approx(right)


def test_the_pseudo_labels_are_of_the_learner_and_calibrated(run):
    found, _ = run
    labels = found.artifact("learner_labels")
    table = pq.read_table(labels.local_file("pseudo_labels.parquet"))
    assert table.num_rows == 1797 and labels.manifest["calibration"]["n"] == 200
    assert found.nodes()["denoiser"].inputs["pseudo_labels"].name == "learner_labels"


def test_the_generated_images_join_the_labelled_ones(run):
    found, _ = run

    one, three = (_images(task_of(found, name)) for name in ("learner", "retrained_learner"))
    assert len(one.labelled) == 10 and len(three.labelled) == 10 + 16 * 10
    assert np.bincount(three.labelled.labels).tolist() == [17] * 10
    assert np.array_equal(one.unlabelled, three.unlabelled)
    # In any order, the real ones first and then the generated ones.
    rows = np.array([169, 3, 10, 0, 3, 42])
    pixels, labels = three.labelled[rows]
    for row, image, label in zip(rows, pixels, labels, strict=True):
        expected = one.labelled.real[row] if row < 10 else three.labelled.generated[row - 10]
        assert np.array_equal(image, expected) and label == three.labelled.labels[row]


def task_of(found, name):
    """What a learner's stage is given of a task, as far as its images go."""
    node = found.nodes()[name]
    task = type("Task", (), {})()
    task.settings = node.settings
    task.inputs = {key: found.artifact(source.name) for key, source in node.inputs.items()}
    return task


def test_labelled_images_that_do_not_fit_are_read_from_their_files(run, tmp_path, monkeypatch):
    found, _ = run
    task = task_of(found, "retrained_learner")
    held = _images(task).labelled
    monkeypatch.setattr(learner, "fits_memory", lambda rows, size, mode: False)
    read = _images(task).labelled
    assert isinstance(read.real, RawImages) and isinstance(read.generated, RawImages)
    assert np.array_equal(read.labels, held.labels)
    rows = np.arange(len(held))[::-1]
    for one, other in zip(held[rows], read[rows], strict=True):
        assert np.array_equal(one, other)


def test_the_image_that_takes_the_place_of_an_unreadable_one_comes_with_its_label(tmp_path):
    for number in range(4):
        path = tmp_path / "images" / "train" / "oak" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(np.full((8, 8), number, np.uint8)))
    path.write_bytes(b"no image")  # the last
    table, _ = INDEXERS["folder"](str(tmp_path / "images"))
    images = RawImages(table, Crop("adm", 8), "L", 0.5)
    names = ["ash", "beech", "elm", "oak"]
    pixels, labels = Labelled(images, None, np.array([3, 1, 2, 1]), names)[np.array([3, 2])]
    assert pixels[:, 0, 0, 0].tolist() == [0, 2] and labels.tolist() == [3, 2]
    generated = Labelled(np.zeros((2, 8, 8, 1), np.uint8), images, np.array([0, 0, 3, 1, 2, 1]), names)
    pixels, labels = generated[np.array([5, 1, 4])]  # the last generated one: the first of them
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 2] and labels.tolist() == [3, 0, 2]

    # Of class 0 no other image is left; the generated ones do not count.
    alone = Labelled(images, np.zeros((1, 8, 8, 1), np.uint8), np.array([3, 1, 2, 0, 0]), names)
    assert alone[np.array([0, 1, 4])][1].tolist() == [3, 1, 0]
    with pytest.raises(ConfigError, match=r"^labels: no labelled image of class ash can be read .*; label"):
        alone[np.array([1, 3])]


def test_results_have_the_learner_beside_the_others(run):
    found, _ = run
    result = json.loads((found.output / "runs" / "digits" / "evaluation.json").read_text())
    assert [row["method"] for row in result["accuracy"]][-2:] == ["semi_supervised", "semi_supervised_dpt"]
    assert result["gain"]["improved"] == "semi_supervised_dpt"
    assert result["gain"]["baseline"] == "semi_supervised"
    pairs = {(gain["improved"], gain["baseline"]) for gain in result["gains"]}
    assert ("semi_supervised", "probe") in pairs and ("dpt", "semi_supervised") in pairs
    text = (found.output / "runs" / "digits" / "report.html").read_text()
    assert "freematch, 6 steps" in text
    for curve in ("Learner loss", "Learner class entropy", "Learner share above threshold"):
        assert curve in text


def test_predict_uses_the_learners_own_encoder_and_temperature(run):
    """The learner's probabilities are those of its pseudo-labels."""
    found, _ = run
    made, _ = best_classifier.best_classifier(found.config)
    choices = {choice.method: choice for choice in best_classifier._classifiers(made)}
    assert {choices[name].encoder for name in ("probe", "dpt", "dpt_paper")} == {"encoder"}
    assert choices["semi_supervised_dpt"].encoder == "retrained_learner"
    labeller = predict.load_labeller(found.config, "semi_supervised")
    measured = found.artifact("learner_classifier").manifest["calibration"]
    assert measured == found.artifact("learner_labels").manifest["calibration"]
    table = pq.read_table(found.artifact("learner_labels").local_file("pseudo_labels.parquet"))
    ids, pixels = next(iterate_pixels(found.artifact("index"), labeller.encoder.crop, "L", "validation"))
    rows = {row["id"]: row for row in table.to_pylist()}
    confidence = np.array([rows[identifier]["confidence"] for identifier in ids])
    np.testing.assert_allclose(labeller(pixels).max(1), confidence, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_continues_to_the_same_weights(run, tmp_path, method, monkeypatch):
    found, _ = run
    changes = (f"classifier.learner={method}", "labels_from=learner", "semi_supervised.seed=1")
    undisturbed, cut = (found.copy_to(tmp_path / name, *changes) for name in "ab")
    make(undisturbed.config, "learner")
    real, saved = training.save_checkpoint, []

    def save_and_die(out, step, *rest):
        real(out, step, *rest)
        saved.append(step)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_checkpoint", save_and_die)
        make(cut.config, "learner")
    assert saved[-1] == 4
    make(cut.config, "learner")
    one, other = (run.payloads("learner")["model.safetensors"] for run in (undisturbed, cut))
    assert one == other


@pytest.mark.cluster
def test_two_workers_train_the_weights_of_one_up_to_rounding(run, tmp_path):
    found, _ = run
    check_two_workers(found, tmp_path, "learner", "semi_supervised.seed=3")


def test_images_that_do_not_fit_are_read_from_their_files(run, tmp_path, monkeypatch):
    found, _ = run
    changes = ("semi_supervised.seed=2", "semi_supervised.steps=2")
    held, read = (found.copy_to(tmp_path / name, *changes) for name in ("held", "read"))
    make(held.config, "learner")
    with monkeypatch.context() as patch:
        patch.setattr(training_images, "fits_memory", lambda rows, size, mode: False)
        patch.setattr(training_images, "load_pixels", lambda *given: pytest.fail("held in memory"))
        make(read.config, "learner")
    one, other = (run.payloads("learner")["model.safetensors"] for run in (held, read))
    assert one == other


def test_generated_images_that_do_not_fit_train_the_same_weights(run, tmp_path, monkeypatch):
    found, _ = run
    again = found.copy_to(tmp_path, without=["retrained_learner"])
    for module in (learner, training_images):
        monkeypatch.setattr(module, "fits_memory", lambda rows, size, mode: False)
        monkeypatch.setattr(module, "load_pixels", lambda *given: pytest.fail("held in memory"))
    assert "retrained_learner" in make(again.config, "retrained_learner")
    one, other = (run.payloads("retrained_learner")["model.safetensors"] for run in (found, again))
    assert one == other


def test_a_head_starts_from_the_probe(run):
    found, _ = run
    task = task_of(found, "learner")
    encoder, W = load_encoder(task.inputs["encoder"].uri), load_classifier(task.inputs["classifier"])
    temperature = task.inputs["pseudo_labels"].manifest["calibration"]["temperature"]
    images = torch.randint(0, 256, (5, 8, 8, 1), dtype=torch.uint8)
    expected = logits(row_normalise(encoder(images).numpy()), W) / temperature
    with torch.no_grad():
        student = _student(task)(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    np.testing.assert_allclose(student, expected, rtol=1e-3, atol=1e-3)
    task.settings = task.settings.model_copy(update={"head": "random"})
    assert F.softmax(_student(task)(torch.zeros(1, 1, 8, 8)), 1).max().item() == pytest.approx(0.1, abs=1e-3)


def test_batch_normalisation_keeps_its_statistics():
    spec = EncoderSpec("conv", "with_bn", 4, Crop("adm", 8), (0.5,), (0.5,), width=8)
    network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten())
    student = FineTuned(Encoder(network, spec), np.ones((2, 4), np.float32)).train()
    images, alone = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    alone[:1] = images[:1]
    with torch.no_grad():  # what an image gives does not depend on the others of its batch
        torch.testing.assert_close(student(images)[0], student(alone)[0])
    assert network[1].running_mean.tolist() == [0] * 4
    assert student.training and network[1].weight.requires_grad


def test_what_the_features_do_not_use_is_not_trained():
    network = MsnVit(image_size=8, patch_size=4, channels=3, dim=16, depth=1, heads=2)
    spec = EncoderSpec("msn", "tiny", 16, Crop("eval", 8, 9), (0.5,) * 3, (0.5,) * 3, heads=2)
    student = FineTuned(Encoder(network, spec), np.ones((2, 16), np.float32))
    student.freeze_unused(8)
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {"network.norm.weight", "network.norm.bias"}
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_class_without_a_label_is_named(finished, tmp_path):
    listed = tmp_path / "labels.csv"
    table = pq.read_table(finished.artifact("labels").local_file("labels.parquet")).to_pylist()
    names = finished.artifact("index").read_json("classes.json")
    rows = [f"{row['id']},{names[row['label']]}" for row in table if row["label"] != 3]
    listed.write_text("\n".join(["id,label", *rows]) + "\n")
    changes = ("labels.per_class=", f"labels.file={listed}")
    with pytest.raises(ConfigError, match=r"labels: no labelled image of 1 of the 10 classes \(3\)"):
        make(learning(finished, tmp_path / "run", "semi_vit", *changes).config, "learner")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("semi_supervised=null", "classifier.learner freematch needs a semi_supervised section"),
        ("semi_supervised.threshold=0.7", "threshold 0.7: freematch has adaptive ones"),
        ("semi_supervised.mixup=true", "semi_supervised.mixup: freematch mixes no labelled images"),
        ("semi_supervised.threshold=1.5", "semi_supervised.threshold"),
        ("semi_supervised.group=24", "group 24 must divide batch_size 16"),
        ("compute.train_workers=4", "has 2 groups of 8 for compute.train_workers"),
        ("classifier.learner=linear", "labels_from learner needs another classifier.learner"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, said):
    changes = ["classifier.learner=freematch", *TINY, "labels_from=learner", change]
    with pytest.raises(ConfigError) as refused:
        load_config(DIGITS, changes)
    assert said in str(refused.value) and "\n" not in str(refused.value)
