"""The setting `compute.compile` reaches the networks of the actors that extract and sample."""

import pytest
import torch

from dpt_ray.config.sections import SampleSettings
from dpt_ray.data.crops import Crop
from dpt_ray.models.autoencoder import open_autoencoder
from dpt_ray.models.conv import SmallConvNet
from dpt_ray.models.encoder import Encoder, save_encoder
from dpt_ray.models.own_networks import conv_spec
from dpt_ray.stages.extract import ExtractUnit, Output
from dpt_ray.stages.samples import GenerateUnit, Sampler
from dpt_ray.store.artifact import Store
from tests.helpers.latents import make_latents
from tests.helpers.paths import GOLDEN


@pytest.fixture
def compiled(monkeypatch):
    """The networks that were compiled, by the names of their classes."""
    names = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: names.append(type(module).__name__))
    return names


@pytest.mark.parametrize("asked", [False, True])
def test_extraction_compiles_the_encoder_and_the_autoencoder(tmp_path, compiled, asked):
    crop = Crop("adm", 32)
    network = SmallConvNet(3, 8, 8)
    save_encoder(tmp_path / "encoder", Encoder(network, conv_spec(network, crop)))
    open_autoencoder("kl", GOLDEN / "autoencoder_kl.pth", size=32).save(tmp_path / "vae")
    store = Store(str(tmp_path))
    features = Output("f", store.artifact("features", "x"), f"{tmp_path}/encoder", crop, True, "float32", 0.0)
    moments = Output("m", store.artifact("moments", "x"), f"{tmp_path}/vae", crop, False, "float32", 0.0)
    outputs = [Output(**{**vars(output), "compile": asked}) for output in (features, moments)]
    ExtractUnit(outputs, 4, 1)
    assert compiled == (["SmallConvNet", "Encoder", "Decoder"] if asked else [])


@pytest.mark.parametrize("asked", [False, True])
def test_sampling_compiles_the_blocks_of_the_denoiser(tmp_path, compiled, asked):
    latents = make_latents(tmp_path)
    folders = latents.make("diffusion.steps=1").out.uri, latents.artifact("autoencoder").uri
    how = SampleSettings(nfe=2, precision="float32")
    GenerateUnit(Sampler(latents.artifact("samples"), *folders, "x", 256, 1, how, asked))
    assert compiled == (["Block"] * 3 if asked else [])
