import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from dpt_ray.training.ema import EMA
from dpt_ray.training.optimizer import adamw
from dpt_ray.training.state import pack, restore


def trained(seed: int, width: int = 3) -> tuple[nn.Module, EMA, torch.optim.AdamW]:
    """A small net after one step, so that every tensor of its state is set."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
        p.grad = torch.randn(p.shape, generator=generator)
    ema, optimizer = EMA(model, 0.5), adamw(model, 0.1, 0.0, (0.9, 0.99))
    optimizer.step()
    ema.update(model)
    return model, ema, optimizer


def test_state_survives_safetensors_exactly():
    saved = pack(*trained(seed=1))
    assert json.dumps(sorted(saved))  # names are plain text
    target = trained(seed=2)
    restore(*target, load(save(saved)))
    restored = pack(*target)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[key], saved[key]) for key in saved)


def test_state_covers_weights_averages_moments_and_step_counts():
    saved = pack(*trained(seed=1))
    assert saved["optimizer.step.0.weight"] == 1
    assert {"model.1.running_mean", "ema.0.bias", "optimizer.exp_avg_sq.1.weight"} <= saved.keys()
    assert len(saved) == 7 + 7 + 3 * 4


def test_saved_state_does_not_follow_the_run():
    model, ema, optimizer = trained(seed=1)
    saved = pack(model, ema, optimizer)
    before = saved["model.0.weight"].clone()
    nn.init.zeros_(model[0].weight)
    assert torch.equal(saved["model.0.weight"], before)


def test_a_checkpoint_of_another_model_is_refused_by_name_and_changes_nothing():
    saved = pack(*trained(seed=1))
    saved["model.extra"] = torch.zeros(1)
    del saved["ema.0.bias"]
    saved["model.0.weight"] = torch.zeros(4, 2)
    target = trained(seed=2)
    before = pack(*target)
    with pytest.raises(ValueError) as error:
        restore(*target, saved)
    for part in (
        "missing: ema.0.bias",
        "unexpected: model.extra",
        "model.0.weight (4, 2) float32 instead of (3, 2) float32",
    ):
        assert part in str(error.value)
    after = pack(*target)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_many_problems_are_counted_not_listed():
    target = trained(seed=2)
    with pytest.raises(ValueError, match="and 21 more"):
        restore(*target, {})
