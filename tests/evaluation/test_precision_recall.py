import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_prc import calculate_precision_recall_full

from dpt_ray.evaluation.precision_recall import precision_recall


def normal(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) + 5


def coverage(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    radii = NearestNeighbors(n_neighbors=k).fit(points).kneighbors()[0][:, -1]
    distances = np.linalg.norm(queries[:, None] - points[None], axis=2)
    return float((distances <= radii).any(axis=1).mean())


@pytest.mark.parametrize("k", [1, 3, 10])
def test_agrees_with_scikit_learn_neighbours_and_torch_fidelity(k):
    real, generated = normal(150, 4, seed=0), normal(110, 4, seed=1, scale=0.6)
    result = precision_recall(real, generated, neighbours=k)
    x, y = real.numpy(), generated.numpy()
    assert result == pytest.approx((coverage(y, x, k), coverage(x, y, k)))
    assert result == pytest.approx(calculate_precision_recall_full(generated, real, k), abs=1e-6)
    assert result[0] != result[1]


@pytest.mark.parametrize("chunk", [1, 7, 150, 1000])
def test_the_chunk_size_does_not_change_the_result(chunk):
    real, generated = normal(150, 4, seed=0), normal(110, 4, seed=1, scale=0.6)
    x, y = real.numpy(), generated.numpy()
    expected = coverage(y, x, 3), coverage(x, y, 3)
    assert precision_recall(real, generated, chunk=chunk) == pytest.approx(expected)


def test_a_dropped_mode_costs_recall_only():
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    noise = normal(200, 2, seed=0) - 5
    real = noise + modes.repeat_interleave(100, dim=0)
    precision, recall = precision_recall(real, real[:100])
    assert precision == 1.0
    assert recall == 0.5


def test_a_line_of_points_by_hand():
    # Radii to the nearest other: real (1, 1, 4, 4), generated (0.5, 0.5, 30). Generated 0.5, 1 lie
    # within real balls, 31 does not. Real 0, 1 and 5, 9 lie within the ball of 31 (reach 1 .. 61)
    # or of 0.5 (0 .. 1): all four.
    real = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
    generated = torch.tensor([[0.5], [1.0], [31.0]])
    assert precision_recall(real, generated, neighbours=1) == pytest.approx((2 / 3, 1.0))


def test_errors_name_the_value_and_the_remedy():
    with pytest.raises(ValueError, match=r"neighbours 3 is not between 1 and 2.*add images"):
        precision_recall(torch.rand(10, 2), torch.rand(3, 2))
    with pytest.raises(ValueError, match="one extractor"):
        precision_recall(torch.rand(10, 2), torch.rand(10, 3))
