import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from dpt_ray.evaluation.kid import kernel_distance


def normal(n: int, d: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


def test_a_subset_of_all_rows_is_the_unbiased_estimator():
    n = 40
    x, y = normal(n, 6, seed=0), normal(n, 6, seed=1, mean=0.3)
    xx, xy, yy = (polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (x, y), (y, y)))
    off_diagonal = sum(k.sum() - k.trace() for k in (xx, yy)) / (n * (n - 1))
    expected = off_diagonal - 2 * xy.mean()
    mean, spread = kernel_distance(x, y, seed=0, subsets=3, subset_size=n)
    assert mean == pytest.approx(expected, rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-10)


def test_mean_approaches_the_population_value():
    # One dimension: (xy + 1)^3 has features x, x^2, x^3 with weights 3, 3, 1; their means are
    # 0, 1, 0 under N(0, 1) and 1, 2, 4 under N(1, 1), hence 3 + 3 + 16.
    x, y = normal(20_000, 1, seed=0), normal(20_000, 1, seed=1, mean=1.0)
    mean, _ = kernel_distance(x, y, seed=0, subsets=60, subset_size=400)
    assert mean == pytest.approx(22, rel=0.1)


def test_equal_distributions_average_to_zero_at_any_subset_size():
    x, y = normal(4000, 8, seed=0), normal(4000, 8, seed=1)
    mean, spread = kernel_distance(x, y, seed=0, subsets=300, subset_size=20)
    assert abs(mean) < 4 * spread / 300**0.5


def test_the_seed_decides_the_subsets():
    x, y = normal(200, 4, seed=0), normal(150, 4, seed=1)
    first = kernel_distance(x, y, seed=3, subsets=4, subset_size=50)
    assert kernel_distance(x, y, seed=3, subsets=4, subset_size=50) == first
    assert kernel_distance(x, y, seed=4, subsets=4, subset_size=50) != first


def test_spread_is_over_the_subsets_drawn():
    # The estimates are all there is: one has spread 0, as torch-fidelity's numpy.std says.
    x, y = normal(200, 4, seed=0), normal(150, 4, seed=1)
    assert kernel_distance(x, y, seed=3, subsets=1, subset_size=50)[1] == 0.0


def test_errors_name_the_value_and_the_remedy():
    x = normal(30, 4, seed=0)
    with pytest.raises(ValueError, match=r"subset_size 1000 is not between 2 and 30.*lower"):
        kernel_distance(x, normal(2000, 4, seed=1), seed=0)
    with pytest.raises(ValueError, match="subset_size 1 "):
        kernel_distance(x, x, seed=0, subset_size=1)
    with pytest.raises(ValueError, match="one extractor"):
        kernel_distance(x, normal(30, 5, seed=1), seed=0)
