"""Alignment and the Frechet distance in the denoiser's training, on a handful of hand-made latents."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpt_ray.config.sections import SampleSettings
from dpt_ray.data.shards import read_features
from dpt_ray.learners import training_frechet
from dpt_ray.models.uvit import UViT, UViTConfig
from dpt_ray.stages import report
from dpt_ray.stages.denoiser import Denoiser
from dpt_ray.store.checkpoints import checkpoint_names
from dpt_ray.training.log import read_log
from tests.helpers.latents import CLASSES, DIM, ROWS, make_latents, same, weights

ALIGNED = "diffusion.alignment=0.5"


@pytest.fixture
def latents(tmp_path):
    return make_latents(tmp_path)


def remove(task):
    task.out.fs.rm(task.out.path(""), recursive=True)


def test_the_projection_is_in_the_checkpoint_and_not_in_the_denoiser(latents):
    task = latents.make(ALIGNED)
    network = UViT(UViTConfig(**json.loads(task.out.read_bytes("config.json"))["model"]))
    network.load_state_dict(weights(task))
    [*_, newest] = checkpoint_names(task.out)
    state = load_file(task.out.path(f"checkpoints/{newest}.safetensors"))
    for kind in ("model", "ema", "optimizer.exp_avg"):
        assert f"{kind}.projection.4.weight" in state
    assert not same(weights(task), weights(latents.make()))


def test_an_aligned_training_that_is_resumed_goes_on_to_the_same_bits(latents):
    whole = latents.make(ALIGNED, "diffusion.steps=17")
    expected, state = weights(whole), load_file(whole.out.path("checkpoints/000000017.safetensors"))
    remove(whole)
    latents.make(ALIGNED, "diffusion.steps=9")
    task = latents.make(ALIGNED, "diffusion.steps=17")
    assert task.out.manifest["continued_at_step"] == 9
    assert same(weights(task), expected)
    assert same(load_file(task.out.path("checkpoints/000000017.safetensors")), state)


def test_features_come_to_their_images_by_id_and_not_by_place(latents):
    values = np.random.default_rng(2).normal(size=(ROWS + 3, DIM)).astype(np.float32)
    ids = [f"image-{row}" for row in range(ROWS)] + ["test-0", "test-1", "test-2"]
    latents.encode(values, ids)
    expected = latents.make(ALIGNED)
    found = weights(expected)
    remove(expected)
    latents.encode(values[::-1], ids[::-1])
    assert same(weights(latents.make(ALIGNED)), found)


def test_an_image_without_features_is_named(latents):
    latents.encode(np.ones((ROWS - 2, DIM), np.float32), [f"image-{row}" for row in range(ROWS - 2)])
    with pytest.raises(Exception, match="2 images have no features, the first is image-38"):
        Denoiser.make(latents.task(ALIGNED))


def test_given_weights_can_be_trained_on_aligned_and_without_conditions(latents):
    source = latents.make().out.path("model.safetensors")
    still = ("diffusion.learning_rate=1e-30", "diffusion.weight_decay=0", "diffusion.steps=1")
    task = latents.make(ALIGNED, *still, f"diffusion.init_from={source}", "diffusion.condition=none")
    for key, value in load_file(source).items():
        torch.testing.assert_close(weights(task)[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [(), (ALIGNED,)])
def test_the_distance_in_the_log_is_that_of_the_images_the_weights_would_be_sampled_to(
    latents, options, monkeypatch
):
    from dpt_ray.evaluation.frechet import FeatureStatistics, frechet_distance
    from dpt_ray.models.encoder import load_encoder
    from dpt_ray.stages.samples import GenerateUnit, Sampler

    monkeypatch.setattr(training_frechet, "IMAGES", 30)
    monkeypatch.setattr(training_frechet, "BLOCK", 7)
    plain = latents.make(*options)
    expected, log = weights(plain), read_log(plain.out)
    remove(plain)
    task = latents.make(*options, "diffusion.frechet_every=4", "generate.guidance=1.5", "generate.seed=3")
    # The training is the one without it, to the last bit.
    assert same(weights(task), expected)
    records = read_log(task.out)
    assert [record["loss"] for record in records] == [record["loss"] for record in log]
    assert [record["step"] for record in records if "frechet" in record] == [4, 8, 12]
    assert {record["frechet_guidance"] for record in records if "frechet" in record} == {1.5}

    # The last distance from what the samples stage makes of the published weights.
    folders = task.out.uri, latents.artifact("autoencoder").uri
    how = SampleSettings(guidance=1.5, nfe=10, seed=3, precision="float32")
    actor = GenerateUnit(Sampler(latents.artifact("samples"), *folders, "x", 256, 1, how))
    items = [(label, index) for index in range(8) for label in range(CLASSES)][:30]
    encoder = load_encoder(latents.artifact("encoder").uri)
    _, real = read_features(latents.artifact("features"))
    distance = frechet_distance(
        FeatureStatistics.of(encoder(torch.from_numpy(actor._sample(items)))),
        FeatureStatistics.of(torch.from_numpy(real)),
    )
    assert records[-1]["frechet"] == pytest.approx(distance, rel=1e-4)
    facts = task.out.read_json("frechet.json")
    assert (facts["n_generated"], facts["n_reference"], facts["guidance"]) == (30, ROWS, 1.5)


def test_tensorboard_and_the_report_show_the_distance_and_the_report_says_of_what(latents, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(training_frechet, "IMAGES", 30)
    task = latents.make(
        "diffusion.frechet_every=6", "generate.guidance=1.5", "generate.guidance_interval=[0.2, 0.8]"
    )
    events = EventAccumulator(task.out.path("tensorboard")).Reload().Scalars("training/frechet")
    log = [record for record in read_log(task.out) if "frechet" in record]
    assert [event.step for event in events] == [record["step"] for record in log] == [6, 12]
    assert [event.value for event in events] == pytest.approx([record["frechet"] for record in log])

    shown = {"denoiser": task.out, "encoder": latents.artifact("encoder")}
    points = [(record["step"], record["frechet"]) for record in log]
    assert report._curves(shown)["Frechet distance at guidance 1.5"] == points
    note = report._curve_note(task.out)
    for said in ("30 images", "guidance 1.5 for t in [0.2, 0.8]", "40 real training images", "run's encoder"):
        assert said in note
