import io
from itertools import permutations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image.fid import _compute_fid

from dpt_ray.evaluation.frechet import FeatureStatistics, frechet_distance


def correlated(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + seed


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(None, mean.double(), covariance.double())


def rotation(d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def test_streamed_moments_equal_numpy_on_all_rows():
    features = correlated(101, 6, seed=1)
    moments = FeatureStatistics.empty(6)
    for batch in features.split(13):
        moments.update(batch)
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean, features.numpy().mean(axis=0), rtol=1e-12)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-11, atol=1e-11)


def test_covariance_survives_a_mean_far_from_the_origin():
    features = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double()
    moments = FeatureStatistics.empty(4)
    for batch in (features + 1e7).split(7):
        moments.update(batch)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, atol=1e-6)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_merging_unequal_and_empty_parts_in_any_order_gives_the_whole(order):
    features = correlated(60, 5, seed=2)
    parts = [features[:1], features[1:30], features[30:30], features[30:]]
    moments = FeatureStatistics.empty(5)
    for i in order:
        moments.merge(FeatureStatistics.of(parts[i]))
    assert moments.count == 60
    np.testing.assert_allclose(moments.mean, features.numpy().mean(axis=0), rtol=1e-12)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-11, atol=1e-11)


def test_merging_leaves_the_merged_part_as_it_was():
    part = FeatureStatistics.of(correlated(10, 3, seed=1))
    before = part.covariance.clone()
    total = FeatureStatistics.empty(3)
    total.merge(part)
    total.update(correlated(10, 3, seed=9))
    assert part.count == 10
    assert torch.equal(part.covariance, before)


def test_low_precision_features_accumulate_in_float64():
    features = correlated(40, 3, seed=1).bfloat16()
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(FeatureStatistics.of(features).covariance, expected, rtol=1e-12)


def test_distance_of_diagonal_gaussians_is_the_closed_form_in_any_basis():
    # |m|^2 + sum (sqrt s_a - sqrt s_b)^2 for commuting covariances, here with zero variances too.
    mean = torch.tensor([1.0, 2.0, 0.0, 0.0])
    a, b = torch.tensor([4.0, 9.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = 5 + (1 + 4 + 0 + 1)
    q = rotation(4)
    plain = frechet_distance(gaussian(mean, a.diag()), gaussian(0 * mean, b.diag()))
    rotated = frechet_distance(
        gaussian(q @ mean.double(), q @ a.double().diag() @ q.T),
        gaussian(0 * mean, q @ b.double().diag() @ q.T),
    )
    assert plain == pytest.approx(expected, rel=1e-12)
    assert rotated == pytest.approx(expected, rel=1e-7)


def test_distance_agrees_with_torch_fidelity_and_torchmetrics():
    x, y = correlated(300, 24, seed=3), correlated(300, 24, seed=4)
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(y)
    reference = [{"mu": f.numpy().mean(axis=0), "sigma": np.cov(f.numpy(), rowvar=False)} for f in (x, y)]
    fidelity = fid_statistics_to_metric(*reference, False)["frechet_inception_distance"]
    metrics = _compute_fid(*(torch.from_numpy(r[k]) for r in reference for k in ("mu", "sigma")))
    assert frechet_distance(a, b) == pytest.approx(fidelity, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(float(metrics), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_fewer_samples_than_dimensions_still_gives_the_distance():
    # Two points each: rank-one covariances 2 u u^T and 2 v v^T, so tr (S_a S_b)^1/2 = 2 |u . v|.
    u, v = torch.zeros(50), torch.zeros(50)
    u[0], v[0], v[1] = 1.0, 0.6, 0.8
    a, b = FeatureStatistics.of(torch.stack([u, -u])), FeatureStatistics.of(torch.stack([v, -v]) + 1)
    assert frechet_distance(a, b) == pytest.approx(50 + 2 + 2 - 2 * 2 * 0.6, rel=1e-7)


def test_distance_to_itself_is_zero_and_never_negative():
    for n in (5, 200):
        moments = FeatureStatistics.of(correlated(n, 40, seed=6))
        scale = float(moments.covariance.trace())
        assert 0 <= frechet_distance(moments, moments) < 1e-11 * scale


def test_shrinking_sample_overestimates_the_distance():
    # The bias stated in the module: both sets come from N(0, I), where the true distance is 0.
    generator = torch.Generator().manual_seed(0)
    far = [
        frechet_distance(*(FeatureStatistics.of(torch.randn(n, 16, generator=generator)) for _ in "ab"))
        for n in (40, 400, 4000)
    ]
    assert far[0] > 3 * far[1] > 9 * far[2] > 0


def test_saved_moments_continue_where_they_stopped(tmp_path):
    features = correlated(50, 4, seed=7)
    FeatureStatistics.of(features[:20]).save(tmp_path / "moments.npz")
    with np.load(tmp_path / "moments.npz", allow_pickle=False) as npz:
        assert sorted(npz) == ["mu", "n", "sigma"]
        expected = np.cov(features[:20].numpy(), rowvar=False)
        np.testing.assert_allclose(npz["sigma"], expected, rtol=1e-11, atol=1e-12)
    loaded = FeatureStatistics.load(tmp_path / "moments.npz")
    loaded.update(features[20:])
    assert loaded.count == 50
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(loaded.covariance, expected, rtol=1e-10, atol=1e-10)


def adm_reference() -> io.BytesIO:
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    np.savez(
        file,
        arr_0=np.zeros((2, 4, 4, 3), dtype=np.uint8),
        mu=rng.normal(size=3).astype(np.float32),
        sigma=np.diag([1.0, 2.0, 3.0]),
        mu_s=np.ones(2),
        sigma_s=np.diag([4.0, 9.0]),
    )
    file.seek(0)
    return file


def test_adm_reference_file_gives_both_pairs_and_does_not_merge():
    spatial = FeatureStatistics.load(adm_reference(), spatial=True)
    pooled = FeatureStatistics.load(adm_reference())
    assert spatial.covariance.diag().tolist() == [4.0, 9.0]
    assert pooled.covariance.diag().tolist() == [1.0, 2.0, 3.0]
    assert frechet_distance(spatial, gaussian(torch.zeros(2), torch.eye(2))) == pytest.approx(
        2 + (2 - 1) ** 2 + (3 - 1) ** 2
    )
    with pytest.raises(ValueError, match="count is unknown"):
        pooled.update(torch.zeros(2, 3))


def test_reference_of_unknown_count_stays_so_when_saved(tmp_path):
    FeatureStatistics.load(adm_reference()).save(tmp_path / "again.npz")
    again = FeatureStatistics.load(tmp_path / "again.npz")
    assert again.count is None
    assert again.covariance.diag().tolist() == [1.0, 2.0, 3.0]


def test_errors_name_the_value_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"covariance of 1 rows.*add at least 2"):
        _ = FeatureStatistics.of(torch.ones(1, 3)).covariance
    with pytest.raises(ValueError, match=r"4 and 3 features.*one feature extractor"):
        frechet_distance(FeatureStatistics.of(torch.rand(9, 4)), FeatureStatistics.of(torch.rand(9, 3)))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        FeatureStatistics.of(torch.ones(3))
    broken = torch.ones(4, 2)
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 2 is not finite"):
        FeatureStatistics.empty(2).update(broken)
    FeatureStatistics.of(torch.rand(9, 4)).save(tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"lacks.*mu_s"):
        FeatureStatistics.load(tmp_path / "m.npz", spatial=True)
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"expected \(d,\) and \(d, d\)"):
        FeatureStatistics.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(("n_a", "n_b"), [(20, 400), (20, 25), (400, 400)])
def test_distance_of_few_rows_is_that_of_the_row_spaces(n_a, n_b):
    # tr (S_a S_b)^1/2 is the nuclear norm of X_a X_b^T / sqrt((n_a - 1)(n_b - 1)) of the centred rows,
    # in which no covariance, singular or not, occurs.
    x, y = correlated(n_a, 300, seed=3), correlated(n_b, 300, seed=4)
    a, b = x - x.mean(dim=0), y - y.mean(dim=0)
    cross = torch.linalg.svdvals(a @ b.T).sum() / ((n_a - 1) * (n_b - 1)) ** 0.5
    traces = a.square().sum() / (n_a - 1) + b.square().sum() / (n_b - 1)
    expected = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + traces - 2 * cross
    scale = float(traces)
    assert frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)) == pytest.approx(
        float(expected), abs=1e-12 * scale
    )


def test_a_set_of_equal_images_has_the_distance_of_its_mean_and_the_other_trace():
    other = FeatureStatistics.of(correlated(50, 6, seed=3))
    point = FeatureStatistics.of(torch.zeros(7, 6))
    expected = float(other.mean.square().sum() + other.covariance.trace())
    assert frechet_distance(point, other) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(
    ("key", "place", "value", "problem"),
    [
        ("mu", 1, np.nan, "has values that are not finite"),
        ("sigma", (0, 1), np.inf, "has values that are not finite"),
        ("sigma", (1, 1), np.nan, "has values that are not finite"),
        ("sigma", (1, 1), -1.0, "negative variance"),
    ],
)
def test_a_reference_that_is_no_gaussian_is_refused_by_file_and_key(
    tmp_path, spatial, key, place, value, problem
):
    suffix = "_s" if spatial else ""
    arrays = {f"mu{suffix}": np.zeros(2), f"sigma{suffix}": np.eye(2)}
    np.savez(tmp_path / "reference.npz", **arrays)
    FeatureStatistics.load(tmp_path / "reference.npz", spatial=spatial)
    arrays[key + suffix][place] = value
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=rf"reference\.npz: {key}{suffix} .*{problem}"):
        FeatureStatistics.load(tmp_path / "reference.npz", spatial=spatial)


@pytest.mark.parametrize("broken", ["mean", "covariance"])
def test_a_distance_that_is_not_finite_is_an_error_and_not_zero(broken):
    good = gaussian(torch.zeros(2), torch.eye(2))
    nan = torch.full((2, 2), torch.nan)
    bad = gaussian(nan[0], torch.eye(2)) if broken == "mean" else gaussian(torch.zeros(2), nan)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="distance is nan"):
            frechet_distance(*pair)
