import pytest
import torch
from torch import nn

from dpt_ray.training.optimizer import ParameterGroup, adamw, learning_rate


def test_warm_up_rises_linearly_from_zero_to_the_base_rate():
    rates = [learning_rate(step, 2e-4, 4, 100, "constant") for step in range(6)]
    assert rates == pytest.approx([0, 0.5e-4, 1e-4, 1.5e-4, 2e-4, 2e-4])


def test_cosine_halves_midway_and_nears_zero_at_the_end():
    assert learning_rate(10, 1.0, 10, 110, "cosine") == pytest.approx(1.0)
    assert learning_rate(60, 1.0, 10, 110, "cosine") == pytest.approx(0.5)
    assert learning_rate(35, 1.0, 10, 110, "cosine") == pytest.approx(0.5 + 0.5**1.5)
    assert 0 < learning_rate(109, 1.0, 10, 110, "cosine") < 1e-3


def test_warm_up_may_last_the_whole_run():
    assert learning_rate(9, 1.0, 10, 10, "cosine") == pytest.approx(0.9)


def test_one_step_follows_the_adamw_formula():
    # After one step m/(1-b1) = g and v/(1-b2) = g^2: theta (1 - lr wd) - lr g / (|g| + eps).
    model = nn.Linear(2, 1, bias=False)
    theta = model.weight.detach().clone()
    optimizer = adamw(model, 0.1, 0.03, (0.9, 0.99))
    model.weight.grad = torch.tensor([[2.0, -0.5]])
    optimizer.step()
    expected = theta * (1 - 0.1 * 0.03) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(model.weight.detach(), expected)


def test_frozen_weights_have_no_moments():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert set(adamw(model, 0.1, 0.0, (0.9, 0.99)).state) == {model.weight}


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["weight"], "bias (1 in all)"),
        (["weight", "bias", "gain"], "gain (1 in all)"),
        (["weight", "bias", "bias"], "bias"),
    ],
)
def test_groups_that_miss_repeat_or_invent_a_parameter_are_refused(names, wrong):
    with pytest.raises(ValueError) as error:
        adamw(nn.Linear(2, 2), 0.1, 0.0, (0.9, 0.99), [ParameterGroup(names, 1.0, 0.0)])
    assert f"miss, repeat or invent {wrong}" in str(error.value)
