from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from dpt_ray.models.uvit import PRESETS, UViT, UViTConfig, flops, time_sinusoid
from dpt_ray.training.throughput import forward_flops
from tests.helpers.paths import GOLDEN

LARGE_STYLE = UViTConfig(8, 2, 4, dim=48, depth=4, heads=4, num_classes=10)
HUGE_STYLE = UViTConfig(8, 2, 4, dim=32, depth=6, heads=4, num_classes=10, final_conv=False)
STYLES = {"uvit_large_style": LARGE_STYLE, "uvit_huge_style": HUGE_STYLE}


def golden(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    return tensors, weights


def batch(config, size=3):
    generator = torch.Generator().manual_seed(0)
    side, channels = config.image_size, config.in_channels
    x = torch.randn(size, channels, side, side, generator=generator)
    return x, torch.linspace(10, 900, size), torch.arange(size)


def perturbed(config):
    """A network whose zero-initialised weights are not zero."""
    torch.manual_seed(0)
    model = UViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", STYLES)
def test_published_weights_load_strictly_and_give_the_published_output(name):
    tensors, weights = golden(name)
    model = UViT(STYLES[name])
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        out = model(tensors["x"], tensors["t"], tensors["y"])
    assert (out - tensors["out"]).abs().max() <= 1e-5


def test_time_sinusoid_is_cosines_then_sines_down_to_period_ten_thousand():
    time = torch.tensor([0.0, 7.5, 999.0], dtype=torch.float64)
    frequencies = [10000.0 ** (-i / 3) for i in range(3)]
    expected = torch.stack(
        [torch.cos(time * f) for f in frequencies] + [torch.sin(time * f) for f in frequencies],
        dim=1,
    )
    torch.testing.assert_close(time_sinusoid(time, 6).double(), expected, atol=1e-4, rtol=0)


def test_time_mlp_carries_the_published_names():
    added = set(UViT(replace(LARGE_STYLE, time_mlp=True)).state_dict()) - set(UViT(LARGE_STYLE).state_dict())
    assert added == {f"time_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("preset", "tflop", "millions"), [("uvit_l_256", 0.153, 286.8), ("uvit_h_256", 0.266, 500.8)]
)
def test_presets_have_the_published_size(preset, tflop, millions):
    with torch.device("meta"):
        model = UViT(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert flops(PRESETS[preset]) / 1e12 == pytest.approx(tflop, abs=0.0006)


@pytest.mark.parametrize("changes", [{}, {"time_mlp": True}, {"modulation": True}, {"num_classes": 0}])
@pytest.mark.parametrize("config", [LARGE_STYLE, HUGE_STYLE])
def test_flops_agree_with_torchs_counter(config, changes):
    config = replace(config, **changes)
    model, counter = UViT(config), FlopCounterMode(display=False)
    math_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math_attention, counter:
        model(*batch(config, size=1))
    assert flops(config) == counter.get_total_flops() == forward_flops(model, *batch(config, size=1))


def test_zero_initialised_modulation_leaves_the_blocks_identities():
    """With gates 0 attention and MLP add nothing, so their weights cannot matter."""
    torch.manual_seed(0)
    model = UViT(replace(LARGE_STYLE, modulation=True))
    inputs = batch(LARGE_STYLE)
    with torch.no_grad():
        before = model(*inputs)
        for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
            block.attn.qkv.weight.normal_()
            block.mlp.fc1.weight.normal_()
        after = model(*inputs)
    torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_modulation_reaches_every_parameter_with_a_gradient():
    config = replace(HUGE_STYLE, modulation=True)
    model = perturbed(config)
    model(*batch(config)).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("modulation", [False, True])
def test_label_and_time_change_only_their_own_image(modulation):
    config = replace(LARGE_STYLE, modulation=modulation)
    model = perturbed(config)
    x, time, labels = batch(config)
    with torch.no_grad():
        base = model(x, time, labels)
        relabelled = model(x, time, torch.tensor([0, config.null_class, 2]))
        retimed = model(x, time + torch.tensor([0.0, 0.0, 50.0]), labels)
    assert ((base - relabelled).abs().amax((1, 2, 3)) > 1e-4).tolist() == [False, True, False]
    assert ((base - retimed).abs().amax((1, 2, 3)) > 1e-4).tolist() == [False, False, True]


def test_gradient_checkpointing_changes_no_gradient():
    model = perturbed(replace(LARGE_STYLE, modulation=True))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*batch(LARGE_STYLE)).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "image_size=8"),
        ({"heads": 5}, "heads=5"),
        ({"depth": 5}, "depth=5"),
        ({"dim": 7, "heads": 7}, "dim=7"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_classes": 0, "modulation": True}, "num_classes=0 has no label to condition on"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LARGE_STYLE, **changes)
