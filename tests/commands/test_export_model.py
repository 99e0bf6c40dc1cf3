"""A run's denoiser written for others, and read back as the same network."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpt_ray.commands.export import export_model
from dpt_ray.config import ConfigError, load_config
from dpt_ray.models.denoiser import load_denoiser
from dpt_ray.models.published import load_published_uvit
from dpt_ray.models.uvit import UViT, UViTConfig
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.runs import make

PUBLISHED = ("diffusion.model.modulation=false",)
INPUT = (
    torch.linspace(-2, 2, 256).view(4, 1, 8, 8),
    torch.tensor([1.0, 250.0, 500.0, 999.0]),
    torch.tensor([0, 3, 9, 10]),
)


def publish_denoiser(root, overrides=PUBLISHED):
    """A run of which only the denoiser is there, with random weights; its configuration, its network."""
    config = load_config(DIGITS, [f"output={root}/output", *overrides])
    model = UViT(UViTConfig(8, in_channels=1, num_classes=10, **config.diffusion.model.model_dump())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    denoiser = flow(config)["denoiser"].artifact(Store(config.output))
    description = {"model": vars(model.config), "schedule": "cosine", "prediction": "v", "latent_scale": 1.0}
    denoiser.write_json("config.json", description)
    with denoiser.writing("model.safetensors") as path:
        save_file(model.state_dict(), path)
    denoiser.publish({})
    return config, model


def outputs(*models):
    with torch.no_grad():
        return [model(*INPUT) for model in models]


def test_the_published_format_is_the_same_network_for_the_published_loader(tmp_path):
    config, model = publish_denoiser(tmp_path)
    count = export_model(config, "nnet_ema", tmp_path / "out")
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["nnet_ema.pth"]
    loaded = load_published_uvit(tmp_path / "out", heads=model.config.heads).eval()
    assert loaded.config == model.config
    torch.testing.assert_close(*outputs(model, loaded), rtol=0, atol=0)


def test_another_run_takes_the_published_format_as_its_denoiser(tmp_path):
    config, model = publish_denoiser(tmp_path)
    export_model(config, "nnet_ema", tmp_path / "out")
    given = [f"diffusion.weights={tmp_path}/out", "diffusion.condition=true_labels"]
    other = load_config(DIGITS, [f"output={tmp_path}/other", *PUBLISHED, *given])
    make(other, "denoiser")
    imported, description = load_denoiser(flow(other)["denoiser"].artifact(Store(other.output)).uri)
    assert description["condition"] == "true_labels"
    torch.testing.assert_close(*outputs(model, imported), rtol=0, atol=0)


@pytest.mark.parametrize("modulation", [False, True])
def test_safetensors_come_with_all_that_is_needed_to_build_the_network(tmp_path, modulation):
    config, model = publish_denoiser(tmp_path, (f"diffusion.model.modulation={modulation}".lower(),))
    export_model(config, "safetensors", tmp_path / "out")
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (description["schedule"], description["prediction"]) == ("cosine", "v")
    built = UViT(UViTConfig(**description["model"])).eval()
    built.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    torch.testing.assert_close(*outputs(model, built), rtol=0, atol=0)


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path):
    config, _ = publish_denoiser(tmp_path, ())  # the digits' own denoiser is modulated
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"has no modulation; use safetensors, or train with .*=false$"):
        export_model(config, "nnet_ema", out)
    with pytest.raises(ConfigError, match="'torchscript' is unknown; use one of nnet_ema, safetensors"):
        export_model(config, "torchscript", out)
    untrained = load_config(DIGITS, [f"output={tmp_path}/output", "diffusion.seed=7"])
    with pytest.raises(ConfigError, match="run `dpt train-diffusion CONFIG` first"):
        export_model(untrained, "safetensors", out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(ConfigError, match="out' exists; remove it"):
        export_model(config, "safetensors", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "output"]
