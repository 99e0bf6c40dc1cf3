import pytest
import torch

from dpt_ray.config.training import Pretrain
from dpt_ray.learners import msn
from dpt_ray.learners.msn import seen_patches
from dpt_ray.learners.objectives import OBJECTIVES
from dpt_ray.models.own_networks import own_network
from dpt_ray.training.loop import TrainSettings, train
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Hooks, Worker, Workload

VIT = {"network": "test_vit", "patch_size": 4}
CONV = {"network": "resnet", "width": 8}
STEPS = 6


def images(n: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def objective(**network):
    section = Pretrain(
        steps=STEPS,
        batch_size=32,
        learning_rate=1e-3,
        dim=16,
        contrast_group=16,
        prototypes=12,
        augmentation="photographs",
        **network,
    )
    generator = torch.Generator().manual_seed(0)
    return OBJECTIVES["msn"](own_network(section, 3, 16, generator)[0], section, 10, generator)


@pytest.mark.parametrize("network", [VIT, CONV], ids=["vit", "conv"])
def test_two_workers_losses_average_to_that_of_one(network):
    of, x = objective(**network), images()
    whole = of.step_fn(of.model, {"image": x}, StepRandom(0, 3, 0, 32))
    halves = [
        of.step_fn(of.model, {"image": x[lo : lo + 16]}, StepRandom(0, 3, lo, lo + 16)) for lo in (0, 16)
    ]
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-4, atol=0)


def test_a_vision_transformer_that_sees_all_patches_is_itself_and_fewer_are_another_feature():
    network = objective(**VIT).model.online.encoder.eval()
    with torch.no_grad():
        everything = torch.arange(16).expand(32, -1)
        torch.testing.assert_close(seen_patches(network, images(), everything), network(images()))
        changed = images()
        changed[:, :, :4, :4] = 0  # the first patch
        hidden = torch.arange(1, 16).expand(32, -1)
        found = [seen_patches(network, x, hidden) for x in (images(), changed)]
        torch.testing.assert_close(*found)
        assert not torch.allclose(found[0], network(images()), rtol=1e-3)


def test_anchors_keep_half_of_the_patches_each_of_its_own():
    seen = msn._seen(StepRandom(0, 0, 0, 32), "anchor", 16)
    assert seen.shape == (32, 8)
    assert all(len(set(row)) == 8 for row in seen.tolist()) and len(set(map(tuple, seen.tolist()))) > 30


def test_the_target_follows_the_encoder_with_the_papers_momentum_and_has_no_gradient():
    of = objective(**CONV)
    model = of.model
    old = model.target.projection[1].weight.clone()
    with torch.no_grad():
        for parameter in model.online.parameters():
            parameter += 1
    of.before_step(3)
    momentum = 0.996 + 0.004 * 3 / (1.25 * STEPS)
    new = model.online.projection[1].weight
    torch.testing.assert_close(model.target.projection[1].weight, momentum * old + (1 - momentum) * new)
    of.step_fn(model, {"image": images()}, StepRandom(0, 0, 0, 32)).backward()
    assert all(parameter.grad is None for parameter in model.target.parameters())
    assert all(parameter.grad is not None for parameter in model.online.parameters())
    assert model.prototypes.grad is not None


def test_a_training_that_was_stopped_continues_as_if_it_had_not():
    def trained(until: int = STEPS, resume=None):
        of, saved = objective(**CONV), {}
        workload = Workload(
            of.model,
            of.step_fn,
            lambda rows, step: {"image": images(64)[rows]},
            64,
            of.unit,
            before_step=of.before_step,
        )
        settings = TrainSettings(steps=until, batch_size=32, learning_rate=1e-3, checkpoint_every=3)
        hooks = Hooks(on_checkpoint=lambda step, tensors, meta: saved.update({step: (tensors, meta)}))
        return train(workload, settings, Worker(), hooks, resume).ema, saved

    whole, saved = trained()
    again, _ = trained(resume=saved[3])
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert any(name.startswith("target.") for name in whole)
