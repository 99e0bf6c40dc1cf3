import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dpt_ray.training.optimizer import ParameterGroup
from dpt_ray.training.order import batch_rows
from dpt_ray.training.random import StepRandom
from tests.helpers.small_training import ROWS, SETTINGS, denoise, load, run, tiny

GROUPS = [ParameterGroup(["0.weight", "2.weight"], 0.5, 0.3), ParameterGroup(["0.bias", "2.bias"], 1.0, 0.0)]


def test_groups_have_their_own_rates_and_decays_as_in_plain_torch_and_are_clipped_together():
    settings = replace(SETTINGS, checkpoint_every=1)
    result, record = run(settings, parameter_groups=GROUPS)
    model = tiny()
    matrices, vectors = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.99),
        foreach=False,
    )
    for step in range(11):
        loss = denoise(model, load(batch_rows(0, step, 32, ROWS), step), StepRandom(0, step, 0, 32))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rate = 0.02 * (step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 8)) / 2)
        assert record.logs[step]["lr"] == pytest.approx(rate)
        assert record.logs[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for group, scale in zip(optimizer.param_groups, (0.5, 1.0), strict=True):
            group["lr"] = rate * scale
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        found = record.checkpoints[11][0][f"model.{name}"]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    again, _ = run(resume=record.checkpoints[5], parameter_groups=GROUPS)
    assert all(torch.equal(again.ema[key], value) for key, value in result.ema.items())


def test_one_group_of_everything_is_the_training_without_groups():
    names = [name for name, _ in tiny().named_parameters()]
    grouped, _ = run(parameter_groups=[ParameterGroup(names, 1.0, SETTINGS.weight_decay)])
    plain, _ = run()
    assert all(torch.equal(grouped.ema[key], value) for key, value in plain.ema.items())
