import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from dpt_ray.models.conv import SmallConvNet
from dpt_ray.models.layer_decay import layer_decay_groups
from dpt_ray.models.msn import load_msn
from dpt_ray.models.own_networks import vision_transformer
from dpt_ray.models.resnet import ResNet
from tests.helpers.paths import GOLDEN

DECAY, WEIGHT_DECAY = 0.5, 0.05


class Classifier(nn.Module):
    """An encoder with a head, beside a copy that is not trained."""

    def __init__(self, encoder, dim):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(dim, 3)
        self.teacher = nn.Linear(dim, 3).requires_grad_(False)


def tiny_vit():
    return vision_transformer("vit_tiny_patch16_224", 3, 16, 4)


def grouped(model, encoder, decay=DECAY):
    """(scale, weight decay) of each parameter by name."""
    groups = layer_decay_groups(model, encoder, decay, WEIGHT_DECAY)
    return {name: (group.scale, group.weight_decay) for group in groups for name in group.names}


def test_a_vision_transformers_scales_are_the_formula():
    # 12 blocks: the head's id is 13, and the scale of id k is decay^(13 - k).
    found = grouped(model := Classifier(tiny_vit(), 192), model.encoder)
    expected = {
        "encoder.cls_token": (DECAY**13, 0),
        "encoder.pos_embed": (DECAY**13, 0),
        "encoder.patch_embed.proj.weight": (DECAY**13, WEIGHT_DECAY),
        "encoder.patch_embed.proj.bias": (DECAY**13, 0),
        "encoder.blocks.0.attn.qkv.weight": (DECAY**12, WEIGHT_DECAY),
        "encoder.blocks.0.norm1.weight": (DECAY**12, 0),
        "encoder.blocks.7.mlp.fc1.bias": (DECAY**5, 0),
        "encoder.blocks.11.mlp.fc2.weight": (DECAY, WEIGHT_DECAY),
        "encoder.norm.weight": (1, 0),
        "head.weight": (1, WEIGHT_DECAY),
        "head.bias": (1, 0),
    }
    assert {name: found[name] for name in expected} == expected
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_timms_helper_agrees_on_all_but_the_last_norm_of_a_network_with_a_head():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    groups = param_groups_layer_decay(model, WEIGHT_DECAY, ("cls_token", "pos_embed"), layer_decay=DECAY)
    timms = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = grouped(model, model)
    differing = {name for name, p in model.named_parameters() if found[name] != timms[id(p)]}
    assert differing == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        (
            SmallConvNet(3, 8, 16),
            {"stem.weight": 4, "stages.0.conv1.weight": 3, "stages.2.norm1.bias": 1, "norm.bias": 0},
        ),
        (ResNet(3, 8), {"stem.bias": 5, "stages.0.1.conv2.weight": 4, "stages.3.0.skip.weight": 1}),
        (load_msn(GOLDEN / "msn_vit.pth.tar", 3), {"cls_token": None, "blocks.0.norm1.bias": None}),
        (timm.create_model("efficientnet_lite0", num_classes=0), {"conv_stem.weight": 8, "bn1.bias": 8}),
        (timm.create_model("vit_base_patch16_clip_224", num_classes=0), {"norm_pre.weight": 13}),
    ],
    ids=["small_conv", "resnet", "msn", "efficientnet", "clip"],
)
def test_every_encoder_has_its_embedding_first_and_its_norm_last(encoder, expected):
    found = grouped(encoder, encoder)
    depth = len(getattr(encoder, "blocks", getattr(encoder, "stages", ())))
    powers = {"cls_token": depth + 1, "blocks.0.norm1.bias": depth}  # where the depth is the file's
    for name, power in expected.items():
        assert found[name][0] == DECAY ** (powers[name] if power is None else power)
    last = [scale for name, (scale, _) in found.items() if name.split(".")[0] in ("norm", "bn2", "head")]
    assert set(last) <= {1.0}
    assert min(scale for scale, _ in found.values()) == DECAY ** (depth + 1)


def test_decay_1_scales_nothing_and_needs_no_blocks():
    model = nn.Linear(2, 2)
    assert grouped(model, model, decay=1) == {"weight": (1, WEIGHT_DECAY), "bias": (1, 0)}


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"layer_decay {decay}"):
        layer_decay_groups(nn.Linear(2, 2), nn.Linear(2, 2), decay, 0.0)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay 0\.5: Linear has neither blocks nor stages"):
        layer_decay_groups(model := nn.Linear(2, 2), model, 0.5, 0.0)


def test_groups_name_parameters_of_a_wrapped_encoder_on_meta_too():
    with torch.device("meta"):
        encoder = ResNet(3, 8)
        model = nn.ModuleDict({"student": Classifier(encoder, 64)})
    assert grouped(model, encoder)["student.encoder.stem.weight"][0] == DECAY**5
