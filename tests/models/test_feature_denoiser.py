"""The feature denoiser: its shapes, what it depends on, its cost, and its folder."""

import json

import pytest
import torch

from dpt_ray.models import feature_denoiser
from dpt_ray.models.feature_denoiser import FeatureDenoiser, FeatureDenoiserConfig
from dpt_ray.training.throughput import forward_flops

CONFIG = FeatureDenoiserConfig(dim=10, width=16, depth=2, num_classes=3)


def network(config=CONFIG):
    """A network whose gates are open, as after some training."""
    torch.manual_seed(0)
    model = FeatureDenoiser(config)
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.3)
    return model.eval()


def inputs(n=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 10, generator=generator), torch.full((n,), 500.0), torch.arange(n)


def test_the_prediction_has_the_shape_of_the_features():
    x, time, labels = inputs()
    assert network()(x, time, labels).shape == (4, 10)


@torch.no_grad()
def test_rows_do_not_see_each_other():
    x, time, labels = inputs()
    model = network()
    alone = torch.cat([model(x[i : i + 1], time[i : i + 1], labels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, time, labels), alone)


@torch.no_grad()
def test_time_and_class_change_the_prediction_and_the_null_class_is_one_more():
    x, time, labels = inputs()
    model = network()
    found = model(x, time, labels)
    assert not torch.isclose(found, model(x, time + 100, labels)).any(dim=1).all()
    null = model(x, time, torch.full((4,), 3))
    torch.testing.assert_close(found[3], null[3])  # class 3 of three classes is the null class
    assert not torch.allclose(found[:3], null[:3])
    with pytest.raises(IndexError):
        model(x, time, torch.full((4,), 4))


def test_a_new_network_has_closed_gates():
    torch.manual_seed(0)
    model = FeatureDenoiser(CONFIG)
    hidden, condition = torch.randn(4, 16), torch.randn(4, 16)
    for block in model.blocks:
        torch.testing.assert_close(block(hidden, condition), hidden)


def test_the_cost_is_what_torch_counts():
    counted = forward_flops(FeatureDenoiser(CONFIG), *inputs(1))
    assert feature_denoiser.flops(CONFIG) == counted


def test_a_saved_network_is_the_same_with_its_statistics(tmp_path):
    model, mean, std = network(), torch.arange(10.0), torch.full((10,), 2.0)
    feature_denoiser.save_feature_denoiser(tmp_path, model.state_dict(), mean, std, CONFIG, steps=7)
    found = feature_denoiser.load_feature_denoiser(str(tmp_path))
    torch.testing.assert_close(found.network(*inputs()), model(*inputs()), rtol=0, atol=0)
    assert torch.equal(found.mean, mean) and torch.equal(found.std, std)
    told = json.loads((tmp_path / "config.json").read_text())
    assert (told["schedule"], told["prediction"], told["steps"]) == ("linear", "flow", 7)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="width=15 must be even"):
        FeatureDenoiserConfig(dim=10, width=15, depth=2, num_classes=3)
