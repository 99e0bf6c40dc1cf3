import pytest
import torch
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error

from dpt_ray.evaluation.calibration import (
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)


def sampled(n: int, classes: int, true_temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose labels are drawn from softmax(logits / true_temperature)."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    probabilities = (logits / true_temperature).softmax(dim=1)
    return logits, torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def lbfgs_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    beta = torch.full((), 0.1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([beta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(beta * logits, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return 1 / float(beta.detach())


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 3.0])
def test_temperature_that_made_the_labels_is_found(true_temperature):
    logits, labels = sampled(20_000, 5, true_temperature)
    assert fit_temperature(logits, labels) == pytest.approx(true_temperature, rel=0.05)


@pytest.mark.parametrize("n", [30, 3000])
def test_temperature_is_the_minimum_of_the_cross_entropy(n):
    logits, labels = sampled(n, 5, 2.0)
    expected = lbfgs_temperature(logits, labels)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_temperature_follows_the_units_of_the_logits(scale):
    logits, labels = sampled(1000, 5, 2.0)
    expected = scale * lbfgs_temperature(logits, labels)
    assert fit_temperature(scale * logits + 7, labels) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("n", [1, 20, 500])
def test_perfect_classifier_gets_the_confidence_its_rows_support(n):
    # Laplace's rule of succession after n successes in n rows.
    logits, _ = sampled(n, 4, 1.0)
    temperature = fit_temperature(logits, logits.argmax(dim=1))
    confidence = (logits / temperature).softmax(dim=1).amax(dim=1).mean()
    assert float(confidence) == pytest.approx((n + 1) / (n + 2), rel=1e-5)


def test_classifier_worse_than_chance_becomes_uniform():
    logits, _ = sampled(100, 4, 1.0)
    temperature = fit_temperature(logits, logits.argmin(dim=1))
    assert float((logits / temperature).softmax(dim=1).max()) == pytest.approx(0.25, abs=1e-3)


def test_constant_logits_leave_the_temperature_alone():
    assert fit_temperature(torch.ones(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0


def test_calibration_error_by_hand():
    # Ten rows at confidence 0.9 with 7 right, ten at 0.6 with 6 right: 1/2 * 0.2 + 1/2 * 0.
    probs = torch.tensor([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = torch.tensor([0] * 7 + [1] * 3 + [1] * 6 + [0] * 4)
    assert expected_calibration_error(probs, labels) == pytest.approx(0.1, abs=1e-6)
    bins = reliability_bins(probs, labels, bins=4)  # 0.6 is in (0.5, 0.75], 0.9 in (0.75, 1]
    assert bins.counts.tolist() == [0, 0, 10, 10]
    assert bins.accuracy[2:].tolist() == pytest.approx([0.6, 0.7])
    assert bins.confidence[2:].tolist() == pytest.approx([0.6, 0.9])
    assert bins.accuracy[:2].isnan().all()


def test_confidence_on_an_edge_belongs_to_the_bin_below():
    bins = reliability_bins(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0]), bins=4)
    assert bins.counts.tolist() == [0, 1, 0, 0]


def test_saturated_confidence_is_in_the_last_bin():
    bins = reliability_bins(torch.eye(3), torch.tensor([0, 1, 1]))
    assert bins.counts.tolist() == [0] * 14 + [3]
    assert float(bins.accuracy[-1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_agrees_with_torchmetrics(bins):
    logits, labels = sampled(2000, 5, 3.0)
    probs = logits.softmax(dim=1)
    expected = multiclass_calibration_error(probs, labels, num_classes=5, n_bins=bins)
    assert float(expected) > 0.05
    ours = expected_calibration_error(probs, labels, bins)
    assert ours == pytest.approx(float(expected), rel=1e-5)


def test_errors_name_the_value_and_the_remedy():
    logits, labels = sampled(10, 3, 1.0)
    with pytest.raises(ValueError, match="apply softmax"):
        expected_calibration_error(logits, labels)
    with pytest.raises(ValueError, match="bins 0"):
        expected_calibration_error(logits.softmax(dim=1), labels, bins=0)
    with pytest.raises(ValueError, match="n >= 1"):
        fit_temperature(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="not finite"):
        fit_temperature(logits / 0, labels)
