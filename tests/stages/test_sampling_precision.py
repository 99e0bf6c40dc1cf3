"""The setting `autoencoder.precision` reaches the denoiser wherever it samples."""

import pytest
import torch

from dpt_ray.config.sections import SampleSettings
from dpt_ray.learners import training_frechet
from dpt_ray.models.uvit import UViT
from dpt_ray.stages.samples import GenerateUnit, Sampler
from tests.helpers.latents import make_latents


@pytest.fixture
def sampled(monkeypatch):
    """Whether each forward pass without gradients ran in bfloat16."""
    seen, forward = [], UViT.forward

    def watched(self, *inputs):
        if not torch.is_grad_enabled():
            seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *inputs)

    monkeypatch.setattr(UViT, "forward", watched)
    return seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pictures_distances_and_samples_are_drawn_at_the_precision(tmp_path, sampled, monkeypatch, precision):
    monkeypatch.setattr(training_frechet, "IMAGES", 10)
    latents = make_latents(tmp_path)
    short = ("diffusion.steps=4", f"autoencoder.precision={precision}", "generate.nfe=3")

    latents.make(*short, "diffusion.preview_every=4")
    assert sampled == [precision == "bfloat16"] * 3
    sampled.clear()
    task = latents.make(*short, "diffusion.seed=1", "diffusion.frechet_every=4")
    assert sampled == [precision == "bfloat16"] * 3
    sampled.clear()
    folders = task.out.uri, latents.artifact("autoencoder").uri
    how = SampleSettings(guidance=1.5, nfe=3, seed=3, precision=precision)
    sampler = Sampler(latents.artifact("samples"), *folders, "x", 256, 1, how)
    GenerateUnit(sampler)._sample([(0, 0), (1, 0)])
    assert sampled == [precision == "bfloat16"] * 3
