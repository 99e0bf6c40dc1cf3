"""A published denoiser in the place of a trained one."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpt_ray.config import ConfigError, load_config
from dpt_ray.models.denoiser import load_denoiser
from dpt_ray.models.uvit import UViT, UViTConfig
from dpt_ray.models.weights import load_strict, load_weights
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store
from tests.helpers import plain_uvit, runs
from tests.helpers.paths import GOLDEN
from tests.helpers.weights import assert_same_weights

CONFIG = """
name: small
output: {folder}/out
data: {{source: folder, uri: {folder}/images, image_size: 16}}
labels: {{per_class: 1}}
autoencoder: {{kind: kl, weights: {data}/autoencoder_kl.pth}}
pretrain: {{steps: 1, batch_size: 8, contrast_group: 8, learning_rate: 0.1}}
diffusion:
  model: {{dim: 48, depth: 4, heads: 4}}
  steps: 1
  batch_size: 8
  learning_rate: 0.1
  condition: true_labels
  weights: {folder}/nnet_ema.pth
generate: {{images_per_class: 1}}
retrain: {{images_per_class: 1}}
"""


@pytest.fixture
def config(tmp_path):
    for label in range(10):  # the classes of the golden network
        folder = tmp_path / "images" / f"n0000000{label}"
        folder.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "0.JPEG")
    golden = load_file(GOLDEN / "uvit_large_style.safetensors")
    torch.save({k[2:]: v for k, v in golden.items() if k.startswith("w.")}, tmp_path / "nnet_ema.pth")
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=GOLDEN))
    return path


def make(config, *overrides):
    settings = load_config(config, overrides)
    made = runs.make(settings, "denoiser")
    return made, flow(settings)["denoiser"].artifact(Store(settings.output))


def test_a_published_network_is_read_as_the_denoiser_and_nothing_is_trained(config):
    made, denoiser = make(config)
    assert set(made) == {"index", "autoencoder", "denoiser"}
    told = json.loads(denoiser.read_bytes("config.json"))
    model = UViT(UViTConfig(**told["model"]))
    load_strict(model, load_weights(denoiser.file_uri("model.safetensors")), "denoiser")
    golden = load_file(GOLDEN / "uvit_large_style.safetensors")
    with torch.no_grad():
        out = model(golden["x"], golden["t"], golden["y"])
    assert (out - golden["out"]).abs().max() <= 1e-5


def test_a_network_of_another_size_is_told_by_what_differs(config):
    with pytest.raises(ConfigError, match=r"denoiser: .* has depth 4 \(here 2\); correct diffusion\.model"):
        make(config, "diffusion.model.depth=2")


def test_a_published_network_without_labels_is_read_as_the_unconditional_denoiser(config, tmp_path):
    """Names and forward pass are the plain network's; the file alone tells the biases and the time MLP."""
    weights = plain_uvit.checkpoint(
        side=8, patch=2, channels=4, dim=48, depth=4, rows=0, qkv_bias=True, time_mlp=True
    )
    torch.save(weights, tmp_path / "nnet_ema.pth")
    with pytest.raises(
        ConfigError, match=r"has num_classes 0 \(here 10\); correct diffusion\.model or \.cond"
    ):
        make(config)
    _, denoiser = make(config, "diffusion.condition=none", "evaluate.controls=false")
    model, told = load_denoiser(denoiser.uri)
    x, time = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 500.0])
    expected = plain_uvit.forward(weights, 4, x, time)
    out = model(x, time, torch.zeros(2, dtype=torch.long)).double()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert told["classes"] == 10  # images are counted by class all the same, of none in particular


def test_the_number_of_heads_that_a_folder_of_this_project_says_is_checked(config, tmp_path):
    _, denoiser = make(config)
    file = denoiser.path("model.safetensors")
    with pytest.raises(ConfigError, match=r"made with heads 4; set diffusion\.model\.heads to it, not 8$"):
        make(config, f"diffusion.weights={file}", "diffusion.model.heads=8")


def test_published_weights_go_with_true_labels_only(config):
    with pytest.raises(ConfigError, match="set condition true_labels or none"):
        load_config(config, ["diffusion.condition=pseudo_labels"])


def test_the_settings_of_a_training_that_is_not_done_decide_nothing(config):
    def digest(*overrides):
        return flow(load_config(config, overrides))["denoiser"].digest

    assert digest("diffusion.steps=2", "diffusion.seed=4") == digest()
    assert digest("diffusion.schedule=stable_diffusion") != digest()


def test_an_autoencoders_folder_in_diffusers_format_is_read_as_its_file_is(config, tmp_path):
    from dpt_ray.models.autoencoder import load_autoencoder, open_autoencoder

    given = open_autoencoder("kl", GOLDEN / "autoencoder_kl.pth", size=16)
    given.vae.save_pretrained(tmp_path / "vae")
    settings = load_config(config, [f"autoencoder.weights={tmp_path}/vae"])
    runs.make(settings, "autoencoder")
    made = flow(settings)["autoencoder"].artifact(Store(settings.output))
    assert_same_weights(load_autoencoder(made.uri), given)


def test_the_scale_in_an_autoencoders_folder_is_part_of_its_identity(config, tmp_path):
    from dpt_ray.models.autoencoder import open_autoencoder

    folder = tmp_path / "vae"
    open_autoencoder("kl", GOLDEN / "autoencoder_kl.pth", size=16).vae.save_pretrained(folder)

    def digest():
        return flow(load_config(config, [f"autoencoder.weights={folder}"]))["autoencoder"].digest

    before, said = digest(), json.loads((folder / "config.json").read_text())
    assert digest() == before
    (folder / "config.json").write_text(json.dumps({**said, "scaling_factor": 0.13025}))
    assert digest() != before


def test_an_msn_file_has_the_heads_and_blocks_that_are_set(config):
    """The golden network is 48 wide: too narrow for heads of 64, which are all that a file does not say."""
    from dpt_ray.models.encoder import load_encoder

    msn = ("encoder.kind=msn", f"encoder.weights={GOLDEN}/msn_vit.pth.tar")
    with pytest.raises(ConfigError, match=r"encoder: .*heads do not divide dim 48; set encoder\.heads"):
        runs.make(load_config(config, msn), "encoder")
    settings = load_config(config, [*msn, "encoder.heads=4", "encoder.blocks=2"])
    runs.make(settings, "encoder")
    encoder = load_encoder(flow(settings)["encoder"].artifact(Store(settings.output)).uri)
    assert (encoder.spec.heads, encoder.spec.dim) == (4, 2 * 48)
    with pytest.raises(ConfigError, match="heads and blocks are of kind msn, not pretrain"):
        load_config(config, ["encoder.heads=4"])
