import math

import pytest
import torch
from safetensors.torch import load_file

from dpt_ray.learners.msn_loss import log_assignments, msn_loss, msn_targets, sinkhorn
from tests.helpers.paths import GOLDEN


@pytest.fixture
def g():
    return load_file(GOLDEN / "msn_loss.safetensors")


def random_views(views=2, batch=8, dim=5, prototypes=6):
    generator = torch.Generator().manual_seed(0)
    shapes = (views * batch, dim), (batch, dim), (prototypes, dim)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(("iterations", "suffix"), [(0, ""), (3, "_sinkhorn")])
def test_loss_and_targets_are_the_published_ones(g, iterations, suffix):
    terms = msn_loss(g["anchors"], g["targets"], g["prototypes"], 5, iterations)
    assert abs(terms.cross_entropy - g[f"loss{suffix}"].item()) <= 1e-5
    assert abs(terms.entropy_gap - g["me_max"].item()) <= 1e-5
    q = msn_targets(g["targets"], g["prototypes"], 5, iterations)
    assert (q.repeat(3, 1) - g[f"soft_targets{suffix}"]).abs().max() <= 1e-5  # one per anchor, view by view


def test_assignments_have_the_published_entropy(g):
    log_p = log_assignments(g["anchors"], g["prototypes"], 0.1)
    assert abs(-(log_p.exp() * log_p).sum(1).mean() - g["ent"].item()) <= 1e-5


def test_targets_are_sharpened_assignments():
    # cosines 1, 0, -1 at temperature 1: p ~ (e, 1, 1/e), sharpened with T = 1/2: (e^2, 1, e^-2).
    prototypes = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    q = msn_targets(torch.tensor([[3.0, 0.0]]), prototypes, 1, temperature=1.0, sharpening=0.5)
    whole = math.exp(2) + 1 + math.exp(-2)
    expected = torch.tensor([[math.exp(2), 1, math.exp(-2)]]) / whole
    torch.testing.assert_close(q, expected)


def test_the_entropy_gap_is_zero_for_balanced_and_log_k_for_collapsed_predictions():
    prototypes = torch.eye(4)
    balanced = msn_loss(torch.eye(4), torch.eye(4), prototypes, 4, temperature=0.01)
    assert balanced.entropy_gap.item() == pytest.approx(0, abs=1e-6)
    one = torch.eye(4)[:1].expand(4, 4)
    collapsed = msn_loss(one, one, prototypes, 4, temperature=0.01)
    assert collapsed.entropy_gap.item() == pytest.approx(math.log(4), rel=1e-6)
    assert collapsed.cross_entropy.item() == pytest.approx(0, abs=1e-6)


def test_sinkhorn_balances_the_prototypes_and_keeps_rows_summing_to_one():
    generator = torch.Generator().manual_seed(0)
    q = sinkhorn(torch.randn(6, 3, generator=generator, dtype=torch.float64), 200).exp()
    torch.testing.assert_close(q.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.full((3,), 2.0, dtype=torch.float64))


def test_sinkhorn_survives_a_prototype_that_nothing_is_near():
    prototypes = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0], [0.8, 0.2]])
    q = msn_targets(targets, prototypes, 2, 3, temperature=0.01, sharpening=0.25)  # e^-800 in float32
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(2))


def test_gradients_stay_finite_where_a_prediction_underflows():
    anchors = torch.tensor([[1.0, 0.1]], requires_grad=True)
    prototypes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # e^-200 in float32
    sum(msn_loss(anchors, torch.tensor([[1.0, 0.0]]), prototypes, 1, temperature=0.01)).backward()
    assert anchors.grad.isfinite().all()


@pytest.mark.parametrize("iterations", [0, 3])
def test_two_workers_losses_average_to_that_of_one(iterations):
    anchors, targets, prototypes = random_views()
    whole = msn_loss(anchors, targets, prototypes, 4, iterations)
    views = anchors.unflatten(0, (2, 8))
    halves = [
        msn_loss(views[:, lo : lo + 4].flatten(0, 1), targets[lo : lo + 4], prototypes, 4, iterations)
        for lo in (0, 4)
    ]
    for term, parts in zip(whole, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(term, sum(parts) / 2)
    coupled = msn_loss(anchors, targets, prototypes, 8, iterations)
    assert coupled.entropy_gap < whole.entropy_gap  # entropy is concave


def test_gradients_reach_anchors_and_prototypes_but_not_targets():
    anchors, targets, prototypes = (t.requires_grad_() for t in random_views())
    sum(msn_loss(anchors, targets, prototypes, 8, sinkhorn_iterations=3)).backward()
    assert targets.grad is None
    assert anchors.grad.abs().sum() > 0
    assert prototypes.grad.abs().sum() > 0


def test_prototypes_learn_from_the_anchors_alone():
    anchors, targets, prototypes = random_views()
    prototypes.requires_grad_()
    msn_loss(anchors, targets, prototypes, 8).cross_entropy.backward()
    # The same targets as constants, and cross-entropy by torch.
    q = msn_targets(targets, prototypes, 8).repeat(2, 1)
    again = prototypes.detach().clone().requires_grad_()
    cosines = torch.nn.functional.cosine_similarity(anchors[:, None], again[None], dim=-1)
    torch.nn.functional.cross_entropy(cosines / 0.1, q).backward()
    torch.testing.assert_close(prototypes.grad, again.grad)


def test_the_loss_is_float32_under_autocast(g):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = msn_loss(g["anchors"], g["targets"], g["prototypes"], 5)
    assert abs(terms.cross_entropy - g["loss"].item()) <= 1e-5


@pytest.mark.parametrize(("anchors", "targets", "group"), [(16, 8, 3), (12, 8, 8)])
def test_rows_that_do_not_fit_are_refused(anchors, targets, group):
    with pytest.raises(ValueError, match=f"{anchors} anchors and {targets} targets: make targets"):
        msn_loss(torch.ones(anchors, 3), torch.ones(targets, 3), torch.ones(4, 3), group)
