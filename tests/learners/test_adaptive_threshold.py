import numpy as np
import pytest
import torch

from dpt_ray.learners.adaptive_threshold import AdaptiveThreshold, fairness_loss, threshold_rows


def predictions(n: int = 24, classes: int = 5, seed: int = 0) -> np.ndarray:
    raw = np.exp(2 * np.random.default_rng(seed).standard_normal((n, classes)))
    return (raw / raw.sum(1, keepdims=True)).astype(np.float32)


def updated(state: AdaptiveThreshold, q: np.ndarray) -> None:
    state.update(threshold_rows(torch.from_numpy(q)).sum(0))


def test_thresholds_follow_the_formulas_over_several_batches():
    m, classes = 0.9, 5
    state = AdaptiveThreshold(classes, m)
    tau, p, h = 1 / classes, np.full(classes, 1 / classes), np.full(classes, 1 / classes)
    for seed in range(4):
        q = predictions(seed=seed)
        updated(state, q)
        tau = m * tau + (1 - m) * q.max(1).mean()
        p = m * p + (1 - m) * q.mean(0)
        h = m * h + (1 - m) * np.bincount(q.argmax(1), minlength=classes) / len(q)
    np.testing.assert_allclose(state.thresholds().numpy(), p / p.max() * tau, rtol=1e-5)
    np.testing.assert_allclose(state.histogram.numpy(), h, rtol=1e-5)


def test_the_first_threshold_is_that_of_a_uniform_prediction():
    assert AdaptiveThreshold(4).thresholds().tolist() == [0.25] * 4


def test_sums_of_two_workers_update_as_one():
    q = torch.from_numpy(predictions())
    one, two = AdaptiveThreshold(5, 0.5), AdaptiveThreshold(5, 0.5)
    one.update(threshold_rows(q).sum(0))
    two.update(threshold_rows(q[:8]).sum(0) + threshold_rows(q[8:]).sum(0))
    torch.testing.assert_close(one.thresholds(), two.thresholds())


def test_the_averages_are_part_of_a_checkpoint():
    state = AdaptiveThreshold(5, 0.5)
    updated(state, predictions())
    again = AdaptiveThreshold(5, 0.5)
    again.load_state_dict(state.state_dict())
    assert torch.equal(again.thresholds(), state.thresholds())


def test_the_fairness_term_is_the_formula():
    strong = np.random.default_rng(1).standard_normal((24, 5)).astype(np.float32)
    sure = np.arange(24) % 3 > 0
    p, h = np.array([0.3, 0.2, 0.2, 0.2, 0.1]), np.array([0.4, 0.1, 0.2, 0.2, 0.1])
    found = np.exp(strong[sure]) / np.exp(strong[sure]).sum(1, keepdims=True)
    hist = np.bincount(found.argmax(1), minlength=5) / sure.sum()
    assert (hist > 0).all()
    a, b = p / h, found.mean(0) / hist
    expected = (a / a.sum() * np.log(b / b.sum())).sum()
    loss = fairness_loss(
        torch.from_numpy(strong), torch.from_numpy(sure), torch.tensor(p).float(), torch.tensor(h).float()
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_a_sure_element_the_fairness_term_is_zero_with_a_zero_gradient():
    strong = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    state = AdaptiveThreshold(5)
    loss = fairness_loss(strong, torch.zeros(8, dtype=torch.bool), state.prediction, state.histogram)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(strong.grad, torch.zeros(8, 5))


@pytest.mark.parametrize("momentum", [0.0, 1.0, 1.5])
def test_a_momentum_outside_zero_and_one_is_refused(momentum):
    with pytest.raises(ValueError, match="threshold_momentum"):
        AdaptiveThreshold(5, momentum)
