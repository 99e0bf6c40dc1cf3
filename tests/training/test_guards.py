import json
import math
from dataclasses import replace

import pytest

from dpt_ray.training.guards import Diverged, Divergence
from tests.helpers.small_training import SETTINGS, Record, denoise, run


def stops_at(losses, factor=5.0):
    """The step at which a training with these logged losses is stopped, if it is."""
    guard = Divergence(factor)
    for step, loss in enumerate(losses, 1):
        try:
            guard.add(step, loss)
        except Diverged as error:
            return error.step
    return None


FALLING = [1 / (1 + step / 10) for step in range(100)]  # 1 to 0.09


@pytest.mark.parametrize(
    ("after", "step"),
    [
        ([50.0] * 10, 110),
        ([50.0] * 9 + [0.1] + [50.0] * 10, 120),
        ([1.01] * 10, 110),  # back to where it began, from 0.1
        ([50.0] * 9, None),
        ([50.0, 0.1] * 30, None),  # spikes
        ([0.9] * 30, None),  # worse, but better than at the beginning
        ([math.nan] * 30, None),  # skipped steps are counted elsewhere
        ([50.0] * 5 + [math.nan] * 30 + [50.0] * 5, 140),
    ],
)
def test_only_a_loss_that_stays_above_its_beginning_is_a_divergence(after, step):
    assert stops_at(FALLING + after) == step


def test_a_training_that_explodes_at_once_is_stopped():
    assert stops_at([1.0] + [6.0] * 10) == 11


@pytest.mark.parametrize("losses", [[1.0] * 100, [1.0, 4.9] * 50, [1e-3] + [4e-3] * 100])
def test_a_training_that_learns_nothing_is_not_stopped(losses):
    assert stops_at(losses) is None


def test_a_loss_near_zero_may_fluctuate_by_any_factor():
    tiny = [1e-6, 1e-3, 1e-6, 5e-2, 1e-7] * 20
    assert stops_at(FALLING + [1e-7] * 20 + tiny + [0.5] * 20) is None


def test_the_state_survives_json():
    guard = Divergence(5.0)
    for step, loss in enumerate([*FALLING, *[50.0] * 4, 1 / 3], 1):
        guard.add(step, loss)
    again = Divergence(5.0, **json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()


def exploding(step_of_explosion, factor=100.0):
    """The loss of every step from that one on is so many times what it would be."""

    def step_fn(model, batch, random):
        loss = denoise(model, batch, random)
        return loss + (factor - 1) * loss.detach() if random.step >= step_of_explosion else loss

    return step_fn


def test_a_loss_that_stays_far_above_what_it_was_stops_the_run():
    with pytest.raises(Diverged, match=r"at step 25, the last of 10 logged .*diverged_above 5 x") as error:
        run(replace(SETTINGS, steps=40), exploding(15))
    assert error.value.step == 25
    for word in ("lower learning_rate", "set grad_clip"):
        assert word in str(error.value)


@pytest.mark.parametrize("stop", [8, 17, 24])
def test_a_resumed_run_remembers_the_losses_before_it(stop):
    settings = replace(SETTINGS, steps=40, checkpoint_every=1)
    record = Record()
    with pytest.raises(Diverged) as whole:
        run(settings, exploding(15), record=record)
    with pytest.raises(Diverged) as again:
        run(settings, exploding(15), resume=record.checkpoints[stop])
    assert str(again.value) == str(whole.value)


def test_a_checkpoint_of_before_there_was_such_a_guard_is_taken():
    _, record = run(replace(SETTINGS, checkpoint_every=4))
    tensors, meta = record.checkpoints[4]
    meta = {key: value for key, value in meta.items() if key != "losses"}
    assert run(resume=(tensors, meta))[1].logs == record.logs[4:]
