import numpy as np
import pytest
import torch

from dpt_ray.evaluation.image_metrics import Reference, image_metrics
from dpt_ray.evaluation.image_statistics import ImageStatistics, some_positions
from dpt_ray.evaluation.inception import Activations
from dpt_ray.stages.inception_statistics import list_parts


def statistics(n, seed=0, start=0):
    generator = torch.Generator().manual_seed(seed)
    pool, spatial, logits = (torch.randn(n, d, generator=generator) for d in (5, 3, 4))
    positions = torch.arange(start, start + n)
    found = Activations(pool, spatial, logits.softmax(1))
    return ImageStatistics.of(found, positions, positions % 2 == 0, positions), pool


def names(rows):
    return [row["metric"].split(",")[0] for row in rows]


def test_saved_statistics_are_read_bit_by_bit_and_merge_to_the_whole(tmp_path):
    (first, a), (second, b) = statistics(7, seed=1), statistics(4, seed=2, start=7)
    for number, part in enumerate((first, second)):
        part.save(tmp_path / f"{number}.npz")
    one, two = (ImageStatistics.load(tmp_path / f"{number}.npz") for number in (0, 1))
    assert torch.equal(one.spatial.comoment, first.spatial.comoment)
    one.merge(two)
    assert one.count == 11
    both = torch.cat([a, b])
    np.testing.assert_allclose(one.pool.covariance, np.cov(both.numpy(), rowvar=False), rtol=1e-5, atol=1e-6)
    assert torch.equal(one.kept, both[[0, 2, 4, 6, 8, 10]])  # positions 0, 2, ... of the whole
    assert int(one.score.counts.sum()) == 11


def test_what_cannot_be_measured_is_left_out_with_the_reason():
    many, few = statistics(40)[0], statistics(5)[0]
    how = {"extractor": "x", "resize": "none"}
    rows, left_out = image_metrics(many, None, None, **how)
    assert names(rows) == ["Inception Score"]
    assert [reason.split(" need")[0] for reason in left_out] == ["FID and sFID", "KID, precision and recall"]
    assert "evaluate.reference" in left_out[0]
    rows, left_out = image_metrics(few, many, None, **how)
    assert names(rows) == ["FID", "sFID"]
    assert [reason.split(" need")[0] for reason in left_out] == [
        "KID, precision and recall", "Inception Score"
    ]  # fmt: skip
    reference = Reference("some.npz", many.pool, None)
    rows, left_out = image_metrics(many, many, reference, **how)
    assert names(rows) == ["FID", "KID", "Precision", "Recall", "Inception Score"]
    assert left_out == ["sFID needs mu_s and sigma_s, which some.npz has not"]
    assert rows[0]["value"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "ranges"),
    [
        ([1000] * 9, ["00000000-00005000", "00005000-00009000"]),
        ([1000] * 10, ["00000000-00005000", "00005000-00010000"]),  # the first part is that of 9 units
        ([1000] * 6 + [500], ["00000000-00005000", "00005000-00006500"]),
        ([1000] * 5, ["00000000-00005000"]),
        ([1000] * 2, ["00000000-00002000"]),
        ([], []),
    ],
)
def test_parts_are_whole_units_named_by_the_images_they_hold(rows, ranges):
    parts = list_parts([{"rows": count} for count in rows])
    assert [part["shard"] for part in parts] == ranges
    units = [unit for part in parts for unit in range(*part["units"])]
    assert units == list(range(len(rows)))
    assert [sum(rows[: part["units"][0]]) for part in parts] == [part["start"] for part in parts]


def test_the_first_kept_images_are_the_sets_whichever_part_they_are_in():
    parts = [statistics(6, seed=seed) for seed in (1, 2)]
    for (part, _), order in zip(parts, ([0, 1, 4], [2, 3, 5]), strict=True):
        part.order = torch.tensor(order)
    (one, a), (two, b) = parts
    one.merge(two)
    assert torch.equal(one.first(4), torch.stack([a[0], a[2], b[0], b[2]]))


def test_what_was_saved_without_an_order_is_in_order(tmp_path):
    (saved, pool), (more, _) = statistics(6), statistics(4, seed=1, start=6)
    saved.save(tmp_path / "now.npz")
    with np.load(tmp_path / "now.npz") as now:
        np.savez(tmp_path / "before.npz", **{key: now[key] for key in now if key != "order"})
    before = ImageStatistics.load(tmp_path / "before.npz")
    before.merge(more)
    assert torch.equal(before.first(3), pool[[0, 2, 4]])


def test_some_positions_are_a_random_choice_in_order():
    chosen = some_positions(100, 30).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == 30
    assert set(chosen) != set(range(30)) and len({position % 3 for position in chosen}) == 3
    assert some_positions(5, 30).tolist() == [0, 1, 2, 3, 4]
