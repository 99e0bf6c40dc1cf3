"""The alignment of the denoiser's middle block with stage-1 features, against its formula."""

import math

import pytest
import torch

from dpt_ray.diffusion.schedules import Cosine
from dpt_ray.learners.alignment import AlignedDenoiser, alignment_loss, denoiser_weights
from dpt_ray.learners.denoise import denoise_step
from dpt_ray.models.uvit import UViT, UViTConfig
from dpt_ray.training.random import StepRandom

CONFIG = UViTConfig(4, 2, 1, dim=8, depth=2, heads=2, num_classes=3, modulation=True)
ROWS, DIM = 16, 5


def aligned(seed=0):
    torch.manual_seed(seed)
    model = AlignedDenoiser(UViT(CONFIG), DIM)
    for parameter in model.parameters():  # adaLN's zeros hide the blocks behind them
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    moments = torch.cat(
        [torch.randn(ROWS, 1, 4, 4, generator=generator), torch.full((ROWS, 1, 4, 4), -30.0)], 1
    )
    features = torch.randn(ROWS, DIM, generator=generator)
    return {"moments": moments, "label": torch.arange(ROWS) % 3, "features": features}


def loss_of(model, data, alignment, **options):
    step = denoise_step(Cosine(), "v", 1.0, 3, 0.1, alignment=alignment, **options)
    return step(model, data, StepRandom(3, 4, 0, ROWS))


@pytest.mark.parametrize(("angle", "expected"), [(0, 0), (60, 0.5), (90, 1), (180, 2)])
def test_the_loss_is_one_less_the_cosine_of_the_angle_whatever_the_lengths(angle, expected):
    radians = math.radians(angle)
    projection = 7 * torch.tensor([[math.cos(radians), math.sin(radians), 0]])
    assert alignment_loss(projection, torch.tensor([[0.2, 0, 0]])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_weighted_alignment_of_the_pooled_middle_block_is_added_to_the_loss(weight):
    # By hand: the middle block's output is seen by a hook, its patch tokens (after label and time) are
    # averaged, and the projection is three matrices with x sigmoid(x) in between.
    model, data, seen = aligned(), batch(), []
    model.denoiser.mid_block.register_forward_hook(lambda block, given, tokens: seen.append(tokens))
    found = loss_of(model, data, weight)
    pooled = seen[0][:, 2:].double().mean(1)
    first, second, third = (model.projection[i] for i in (0, 2, 4))
    for layer in (first, second):
        pooled = pooled @ layer.weight.double().T + layer.bias.double()
        pooled = pooled / (1 + (-pooled).exp())
    pooled = pooled @ third.weight.double().T + third.bias.double()
    features = data["features"].double()
    cosine = (pooled * features).sum(1) / (pooled.norm(dim=1) * features.norm(dim=1))
    diffusion = loss_of(model.denoiser, data, None)
    assert found.item() == pytest.approx(diffusion.item() + weight * (1 - cosine).mean().item(), rel=1e-5)


def test_min_snr_weights_the_diffusion_loss_and_not_the_alignment():
    model, data = aligned(), batch()
    alignment = loss_of(model, data, 1.0) - loss_of(model.denoiser, data, None)
    both = loss_of(model, data, 1.0, min_snr_gamma=5.0)
    torch.testing.assert_close(both - loss_of(model.denoiser, data, None, min_snr_gamma=5.0), alignment)


def test_the_alignments_gradient_reaches_the_projection_and_the_denoiser_up_to_the_middle_block():
    model, data = aligned(), batch()
    with_it = loss_of(model, data, 0.5)
    gradients = torch.autograd.grad(with_it, list(model.parameters()))
    found = dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))
    plain = dict(model.denoiser.named_parameters())
    without = torch.autograd.grad(loss_of(model.denoiser, data, None), list(plain.values()))
    moved = {
        name
        for name, gradient in zip(plain, without, strict=True)
        if not torch.allclose(found[f"denoiser.{name}"], gradient, atol=1e-7)
    }
    assert all(found[name].abs().max() > 0 for name in found if name.startswith("projection."))
    assert {"patch_embed.proj.weight", "in_blocks.0.mlp.fc1.weight", "mid_block.mlp.fc2.weight"} <= moved
    assert not any(name.startswith(("out_blocks", "norm", "decoder_pred", "final_layer")) for name in moved)


def test_gradient_checkpointing_changes_no_bit_of_the_gradient():
    model, data = aligned(), batch()
    gradients = []
    for model.denoiser.gradient_checkpointing in (False, True):
        gradients.append(torch.autograd.grad(loss_of(model, data, 0.5), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_weights_that_are_kept_are_the_denoisers_under_its_own_names():
    model = aligned()
    kept = denoiser_weights(model.state_dict())
    assert kept.keys() == model.denoiser.state_dict().keys()
    UViT(CONFIG).load_state_dict(kept)
