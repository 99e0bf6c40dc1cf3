import pytest
import torch
from torch import nn

from dpt_ray.training.ema import EMA


def test_average_follows_the_closed_form():
    # Started at 0 with the weight held at 1: 1 - decay^n after n updates.
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9)
    nn.init.ones_(model.weight)
    for _ in range(20):
        ema.update(model)
    torch.testing.assert_close(ema.tensors["weight"], torch.full((2, 3), 1 - 0.9**20))


def test_where_it_copies_the_average_is_the_weights():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    nn.init.ones_(model.weight)
    ema.update(model, copying=True)
    assert torch.equal(ema.tensors["weight"], model.weight)
    nn.init.zeros_(model.weight)
    ema.update(model)
    torch.testing.assert_close(ema.tensors["weight"], torch.full((2, 3), 0.9))


def test_buffers_are_averaged_and_counters_copied():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.75)
    model.running_mean.fill_(4.0)
    model.num_batches_tracked.fill_(5)
    ema.update(model)
    torch.testing.assert_close(ema.tensors["running_mean"], torch.ones(2))
    assert ema.tensors["num_batches_tracked"] == 5


def test_averages_are_apart_from_the_model():
    model = nn.Linear(2, 2)
    ema, before = EMA(model, 0.5), model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    torch.testing.assert_close(ema.tensors["weight"], before)


def test_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"ema_decay 1\.5"):
        EMA(nn.Linear(1, 1), 1.5)
