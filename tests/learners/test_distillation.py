"""Distillation: the loss against torch's divergence and by hand, and an exact continuation."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch import nn
from torch.nn import functional as F  # noqa: N812

from dpt_ray.data.crops import Crop
from dpt_ray.data.rows import row_normalise
from dpt_ray.learners.distillation import distillation_step, draw_weak, parameters_and_flops
from dpt_ray.learners.linear_classifier import probabilities
from dpt_ray.models.encoder import Encoder
from dpt_ray.models.encoder_spec import EncoderSpec
from dpt_ray.training.loop import TrainSettings, train
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Hooks, Worker, Workload

CLASSES, SIZE = 4, 8


def student() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, CLASSES))
    nn.init.normal_(model[1].weight, std=0.2, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(model[1].bias)
    return model


def batch(n: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return {"image": images, "target": (3 * torch.randn(n, CLASSES, generator=generator)).softmax(1)}


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_loss_is_the_cross_entropy_with_the_teachers_probabilities(temperature):
    given, model = batch(), student()
    loss = distillation_step(temperature)(model, given, StepRandom(0, 0, 0, 16))
    loss.backward()
    x = given["image"].numpy().reshape(16, -1).astype(np.float64) / 127.5 - 1
    W, p = model[1].weight.detach().double().numpy(), given["target"].double().numpy()
    scores = x @ W.T / temperature
    assert loss.item() == pytest.approx(-(p * log_softmax(scores, axis=1)).sum(1).mean(), rel=1e-5)
    # CE(p, q) = KL(p || q) + H(p), and H(p) does not depend on the student
    logits = model(given["image"].float() / 127.5 - 1).detach() / temperature
    divergence = F.kl_div(logits.log_softmax(1), given["target"], reduction="batchmean")
    entropy = torch.special.entr(given["target"]).sum(1).mean()
    assert loss.item() == pytest.approx((divergence + entropy).item(), rel=1e-5)
    # dL/dW = (q - p)^T x / (B tau)
    expected = (softmax(scores, axis=1) - p).T @ x / (16 * temperature)
    np.testing.assert_allclose(model[1].weight.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_teachers_probabilities_are_those_of_its_row_normalised_features():
    generator = np.random.default_rng(0)
    raw, W = generator.normal(size=(5, 6)).astype(np.float32), generator.normal(size=(3, 6))
    centred = raw - raw.mean(1, keepdims=True)
    rows = centred / np.sqrt((centred**2).sum(1, keepdims=True))
    e = np.exp(rows @ W.T / 0.2)
    found = probabilities(row_normalise(raw), W, 0.2)
    np.testing.assert_allclose(found, e / e.sum(1, keepdims=True), rtol=1e-5)


def test_the_views_are_weak_and_of_their_positions():
    given, draw = batch(), draw_weak("digits", SIZE)
    whole = draw(given, StepRandom(0, 3, 0, 16))
    assert whole["image"].shape == given["image"].shape and whole["image"].dtype == torch.uint8
    assert whole["target"] is given["target"]
    half = draw({key: value[8:] for key, value in given.items()}, StepRandom(0, 3, 8, 16))
    assert torch.equal(half["image"], whole["image"][8:])
    # Moved by a pixel at most, reflected at the border, never recoloured.
    for image, view in zip(given["image"], whole["image"], strict=True):
        padded = F.pad(image.float(), (1, 1, 1, 1), mode="reflect").to(torch.uint8)
        moves = [padded[:, a : a + SIZE, b : b + SIZE] for a in range(3) for b in range(3)]
        assert any(torch.equal(view, moved) for moved in moves)


def trained(resume=None):
    """Six steps on 32 images: the averages, and the checkpoint of each step."""
    checkpoints, given = {}, batch(32)

    def load(rows, step):
        return {key: value[torch.from_numpy(rows.copy())] for key, value in given.items()}

    def keep(step, tensors, meta):
        checkpoints[step] = tensors, meta

    prepare = draw_weak("small_images", SIZE)
    workload = Workload(student(), distillation_step(0.5), load, 32, prepare=prepare)
    settings = TrainSettings(6, 16, 1e-2, checkpoint_every=1, ema_decay=0.9, log_every=1)
    return train(workload, settings, Worker(), Hooks(on_checkpoint=keep), resume).ema, checkpoints


def test_a_resumed_training_is_bit_identical_to_one_that_never_stopped():
    expected, checkpoints = trained()
    found, after = trained(checkpoints[3])
    assert list(after) == [4, 5, 6]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(after[6][0][key], value) for key, value in checkpoints[6][0].items())


def test_a_student_learns_the_teachers_labels():
    """A linear student of a linear teacher on noise reaches its labels."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (256, 1, 2, 2), dtype=torch.uint8, generator=generator)
    W = torch.randn(CLASSES, 4, generator=generator)
    targets = (4 * (images.flatten(1).float() / 127.5 - 1) @ W.T).softmax(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    optimizer, step = torch.optim.AdamW(model.parameters(), 0.1), distillation_step(1.0)
    for number in range(60):
        optimizer.zero_grad()
        step(model, {"image": images, "target": targets}, StepRandom(0, number, 0, 256)).backward()
        optimizer.step()
    agree = model(images.float() / 127.5 - 1).argmax(1) == targets.argmax(1)
    assert agree.float().mean() > 0.95


def test_parameters_and_operations_are_those_of_encoder_and_classifier():
    spec = EncoderSpec("conv", "plain", 5, Crop("adm", SIZE), (0.5,) * 3, (0.5,) * 3, width=8)
    network = nn.Sequential(nn.Conv2d(3, 5, SIZE), nn.Flatten())
    found = parameters_and_flops(Encoder(network, spec), np.ones((CLASSES, 5), np.float32))
    weights = 5 * 3 * SIZE**2
    assert found == (weights + 5 + CLASSES * 5, 2 * weights + 2 * CLASSES * 5)
