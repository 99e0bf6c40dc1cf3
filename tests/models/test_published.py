import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from dpt_ray.models.published import (
    export_published_uvit,
    load_published_uvit,
    published_config,
    published_uvit,
    with_classes,
)
from dpt_ray.models.uvit import PRESETS, UViT, UViTConfig
from dpt_ray.models.weights import load_weights
from tests.helpers import plain_uvit
from tests.helpers.paths import GOLDEN

LARGE_STYLE = UViTConfig(8, 2, 4, dim=48, depth=4, heads=4, num_classes=10)
HUGE_STYLE = UViTConfig(8, 2, 4, dim=32, depth=6, heads=4, num_classes=10, final_conv=False)
STYLES = {"uvit_large_style": LARGE_STYLE, "uvit_huge_style": HUGE_STYLE}


def golden(name):
    """Inputs and output, and the weights as the public code's `model.state_dict()` holds them."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return tensors, OrderedDict((k[2:], v) for k, v in tensors.items() if k.startswith("w."))


def network(config, seed=0):
    torch.manual_seed(seed)
    return UViT(config)


def assert_same_weights(model, tensors):
    own = model.state_dict()
    assert own.keys() == tensors.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_published_checkpoint_gives_the_published_output(tmp_path, name, as_folder):
    tensors, weights = golden(name)
    folder = tmp_path / "300000.ckpt"
    folder.mkdir()
    torch.save(weights, folder / "nnet_ema.pth")
    model = load_published_uvit(folder if as_folder else folder / "nnet_ema.pth", heads=4)
    assert model.config == STYLES[name]
    with torch.no_grad():
        out = model(tensors["x"], tensors["t"], tensors["y"])
    assert (out - tensors["out"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", STYLES)
def test_the_plain_network_of_the_tests_is_the_public_codes(name):
    tensors, weights = golden(name)
    out = plain_uvit.forward(weights, 4, tensors["x"], tensors["t"], tensors["y"])
    assert (out - tensors["out"]).abs().max() <= 1e-5


# Sizes, then classes with the null class, and biases on q, k and v. Of the public configurations CIFAR-10
# and CelebA are unconditional.
KINDS = {
    "unconditional": {"rows": 0, "qkv_bias": False, "time_mlp": False, "final_conv": True},
    "unconditional_biased": {"rows": 0, "qkv_bias": True, "time_mlp": True, "final_conv": False},
    "conditional_biased": {"rows": 6, "qkv_bias": True, "time_mlp": False, "final_conv": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_labels_or_with_biases_gives_the_plain_networks_output(tmp_path, kind):
    has = KINDS[kind]
    weights = plain_uvit.checkpoint(side=8, patch=2, channels=3, dim=24, depth=4, **has)
    torch.save(weights, tmp_path / "nnet_ema.pth")
    model = load_published_uvit(tmp_path, heads=3)
    kept = {key: has[key] for key in ("qkv_bias", "time_mlp", "final_conv")}
    assert model.config == UViTConfig(8, 2, 3, 24, 4, 3, num_classes=max(0, has["rows"] - 1), **kept)

    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    time, labels = torch.tensor([0.0, 333.3, 999.0]), torch.tensor([0, 3, 5])
    expected = plain_uvit.forward(weights, 3, x, time, labels if has["rows"] else None)
    with torch.no_grad():
        out = model(x, time, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_such_a_network_is_the_checkpoint_that_it_was(tmp_path, kind):
    weights = plain_uvit.checkpoint(side=8, patch=4, channels=1, dim=16, depth=2, **KINDS[kind])
    written = torch.load(
        export_published_uvit(published_uvit(weights, kind, heads=2), tmp_path), weights_only=True
    )
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[key], value) for key, value in weights.items())


def test_a_folders_averaged_weights_come_before_its_raw_ones(tmp_path):
    raw, averaged = (network(LARGE_STYLE, seed).state_dict() for seed in (1, 2))
    torch.save(raw, tmp_path / "nnet.pth")
    torch.save({"step": 3}, tmp_path / "step.pth")
    assert_same_weights(load_published_uvit(tmp_path, heads=4), raw)
    torch.save(averaged, tmp_path / "nnet_ema.pth")
    assert_same_weights(load_published_uvit(str(tmp_path) + "/", heads=4), averaged)
    assert_same_weights(load_published_uvit(tmp_path / "nnet.pth", heads=4), raw)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "optimizer.pth").touch()
    with pytest.raises(ValueError, match=rf"{tmp_path}: no nnet_ema\.pth or nnet\.pth"):
        load_published_uvit(tmp_path)
    with pytest.raises(ValueError, match="elsewhere: no such file"):
        load_published_uvit(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", STYLES)
def test_an_export_holds_the_published_names_and_the_very_weights(tmp_path, name):
    _, weights = golden(name)
    uri = export_published_uvit(published_uvit(weights, name, heads=4), tmp_path / "new" / "export")
    written = torch.load(uri, weights_only=True)
    assert [file.name for file in (tmp_path / "new" / "export").iterdir()] == ["nnet_ema.pth"]
    assert type(written) is dict
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[key], value) for key, value in weights.items())


@pytest.mark.parametrize("changes", [{}, {"time_mlp": True}, {"mlp_ratio": 2.0, "patch_size": 4}])
@pytest.mark.parametrize("config", [LARGE_STYLE, HUGE_STYLE])
def test_an_exported_network_loads_as_it_was(tmp_path, config, changes):
    model = network(replace(config, **changes))
    loaded = load_published_uvit(export_published_uvit(model, tmp_path), heads=4)
    assert loaded.config == model.config
    assert_same_weights(loaded, model.state_dict())


def test_export_and_import_go_through_uris(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, uri = network(HUGE_STYLE), "memory://published/500000.ckpt"
    assert export_published_uvit(model, uri) == f"{uri}/nnet_ema.pth"
    assert fsspec.filesystem("memory").isfile("/published/500000.ckpt/nnet_ema.pth")
    assert_same_weights(load_published_uvit(uri, heads=4), model.state_dict())


def test_an_export_is_no_larger_for_weights_that_lie_in_one_buffer(tmp_path):
    model = network(LARGE_STYLE)
    buffer = torch.zeros(10_000_000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = buffer[: parameter.numel()].view_as(parameter)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    size = Path(export_published_uvit(model, tmp_path)).stat().st_size
    assert size < 4 * numbers + 200_000


def test_a_network_with_modulation_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="modulation=True does not exist in the published"):
        export_published_uvit(network(replace(LARGE_STYLE, modulation=True)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_shapes_tell_the_preset(preset):
    with torch.device("meta"):
        tensors = UViT(PRESETS[preset]).state_dict()
    assert published_config(tensors, "nnet_ema.pth") == PRESETS[preset]


@pytest.mark.parametrize(("dim", "heads"), [(512, 8), (768, 12)])  # U-ViT-S and -M
def test_the_smaller_published_sizes_tell_their_heads(dim, heads):
    with torch.device("meta"):
        tensors = UViT(replace(LARGE_STYLE, dim=dim, heads=2)).state_dict()
    assert published_config(tensors, "nnet_ema.pth").heads == heads
    assert published_config(tensors, "nnet_ema.pth", heads=2).heads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_blocks.1.norm1.bias": None}, r"1 missing \(in_blocks\.1\.norm1\.bias\)"),
        ({"mid_block.attn.qkv.bias": (144,)}, r"1 unexpected \(mid_block\.attn\.qkv\.bias\)"),
        ({"in_blocks.0.attn.qkv.bias": (144,)}, r"4 missing \(in_blocks\.1\.attn\.qkv\.bias, mid_block"),
        ({"norm.weight": (47,)}, r"1 of another shape \(norm\.weight \(47,\) for \(48,\)\)"),
        ({"label_emb.weight": None}, "17 positions for patches, which is not a square number"),
        (
            {"patch_embed.proj.weight": (48, 16)},
            r"not a U-ViT: patch_embed\.proj\.weight missing or of another",
        ),
        ({"pos_embed": (1, 17, 48)}, "15 positions for patches, which is not a square number"),
        ({"pos_embed": (1, 2, 48)}, "image_size=0 must be at least 1"),
        ({"label_emb.weight": (1, 48)}, r"label_emb\.weight has the null class alone"),
    ],
)
def test_what_does_not_fit_is_named_key_by_key(change, message):
    _, weights = golden("uvit_large_style")
    for key, shape in change.items():
        if shape is None:
            del weights[key]
        else:
            weights[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"^ckpt/nnet\.pth: .*{message}") as caught:
        published_uvit(weights, "ckpt/nnet.pth", heads=4)
    assert "\n" not in str(caught.value)


def test_heads_that_no_rule_tells_are_asked_for():
    _, weights = golden("uvit_large_style")
    with pytest.raises(ValueError, match=r"dim 48 is not a published size .* give heads"):
        published_uvit(weights, "nnet.pth")
    with pytest.raises(ValueError, match="dim=48 is not a multiple of heads=5"):
        published_uvit(weights, "nnet.pth", heads=5)


def test_loading_draws_no_random_numbers():
    _, weights = golden("uvit_large_style")
    before = torch.get_rng_state()
    published_uvit(weights, "nnet.pth", heads=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_classes_replace_the_label_rows_and_keep_the_null_class():
    tensors, weights = golden("uvit_large_style")
    before = {name: tensor.clone() for name, tensor in weights.items()}
    changed = with_classes(weights, 500, torch.Generator().manual_seed(0))
    labels = changed["label_emb.weight"]
    assert labels.shape == (501, 48)
    assert labels[:-1].std().item() == pytest.approx(weights["label_emb.weight"][:-1].std().item(), rel=0.05)
    assert labels[:-1].mean().abs() < 0.05 * labels[:-1].std()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(changed[name], before[name]) for name in before if name != "label_emb.weight")

    x, t = tensors["x"], tensors["t"]
    old, new = published_uvit(weights, "old", heads=4), published_uvit(changed, "new", heads=4)
    assert new.config == replace(LARGE_STYLE, num_classes=500)
    with torch.no_grad():  # the unconditional network is the one that was given
        unconditional = [m(x, t, torch.full((3,), m.config.null_class)) for m in (old, new)]
        torch.testing.assert_close(*unconditional, rtol=0, atol=0)


def test_other_classes_depend_on_the_generator_alone(tmp_path):
    export_published_uvit(network(LARGE_STYLE), tmp_path)
    given = load_weights(tmp_path / "nnet_ema.pth")
    first, again, other = (
        with_classes(given, 3, torch.Generator().manual_seed(seed))["label_emb.weight"] for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[:-1], other[:-1])


def test_other_classes_need_a_label_embedding_and_at_least_one_class():
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"label_emb\.weight has no classes"):
        with_classes({}, 3, generator)
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        with_classes(network(LARGE_STYLE).state_dict(), 0, generator)
