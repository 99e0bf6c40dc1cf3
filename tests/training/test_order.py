import numpy as np
import pytest

from dpt_ray.training.order import ShardWindows, batch_rows, share


@pytest.mark.parametrize("batch_size", [4, 7, 10, 25])
def test_every_epoch_holds_each_row_once_across_batch_boundaries(batch_size):
    n, epochs = 10, 7
    line = np.concatenate(
        [batch_rows(3, step, batch_size, n) for step in range(-(-n * epochs // batch_size))]
    )
    for epoch in range(epochs):
        assert sorted(line[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_have_different_orders():
    first, second = batch_rows(0, 0, 50, 50), batch_rows(0, 1, 50, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batch_rows(1, 0, 50, 50))


def test_a_step_has_the_same_rows_whatever_was_asked_before():
    forwards = [batch_rows(5, step, 8, 30) for step in range(12)]
    backwards = [batch_rows(5, step, 8, 30) for step in reversed(range(12))]
    np.testing.assert_array_equal(forwards, backwards[::-1])


def test_writing_into_a_batch_leaves_the_order_alone():
    rows = batch_rows(0, 0, 4, 20)
    kept = rows.copy()
    rows[:] = 0
    np.testing.assert_array_equal(batch_rows(0, 0, 4, 20), kept)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="seed -1"):
        batch_rows(-1, 0, 8, 10)
    with pytest.raises(ValueError, match="n 0"):
        batch_rows(0, 0, 8, 0)


# The two-level shuffle ---------------------------------------------------------------------------

SIZES = [5, 0, 3, 7, 4, 6, 1, 8, 2]  # 36 rows in 8 shards that hold some


def shard_of(rows, sizes=SIZES):
    return np.searchsorted(np.cumsum(sizes), rows, side="right")


def windows(batch_size=4, sizes=SIZES, per_window=3, seed=1):
    return ShardWindows(seed, batch_size, sizes, per_window)


@pytest.mark.parametrize("per_window", [1, 3, 8, 100])
@pytest.mark.parametrize("batch_size", [4, 7, 30, 80])
def test_in_windows_every_epoch_holds_each_row_once(batch_size, per_window):
    order, n, epochs = windows(batch_size, per_window=per_window), sum(SIZES), 5
    line = np.concatenate([order(step) for step in range(-(-n * epochs // batch_size))])
    cut = line[: n * epochs].reshape(epochs, n)
    assert [sorted(epoch) for epoch in cut] == [list(range(n))] * epochs
    assert len({tuple(epoch) for epoch in cut}) == epochs


@pytest.mark.parametrize("batch_size", [4, 7, 30, 80])
def test_the_rows_of_a_step_are_in_the_shards_to_have_at_hand(batch_size):
    order = windows(batch_size)
    for step in range(100):
        assert set(shard_of(order(step))) <= set(order.shards(step))


def test_a_node_holds_two_windows_and_has_each_before_it_is_used():
    order = windows(batch_size=3)  # every window has 6 rows or more
    used_before = set(order.shards(0))
    for step in range(200):
        held, used = set(order.shards(step)), set(shard_of(order(step)))
        assert len(held) <= 2 * 3
        assert used <= used_before  # fetched during an earlier step: nothing waits
        used_before = held


def test_consecutive_steps_touch_few_shards():
    # K steps of B rows lie in at most K * B / (rows of the smallest window) + 2 windows.
    order, k = windows(batch_size=8, sizes=[16] * 60, per_window=4), 12
    for start in range(100):
        rows = np.concatenate([order(step) for step in range(start, start + k)])
        assert len(set(shard_of(rows, [16] * 60))) <= (k * 8 // 64 + 2) * 4


def test_in_windows_a_step_has_the_same_rows_whatever_was_asked_before():
    forwards = [windows()(step) for step in range(30)]
    order = windows()
    backwards = [order(step) for step in reversed(range(30))]
    np.testing.assert_array_equal(forwards, backwards[::-1])
    order(0)[:] = 0
    np.testing.assert_array_equal(order(0), forwards[0])
    assert not np.array_equal(forwards, [windows(seed=2)(step) for step in range(30)])


def test_rows_of_a_window_are_mixed_across_its_shards():
    # A window of 8 shards of 64 rows: 16 rows in a row are of 16 * 8 / 9.2 shards if they are shuffled.
    order = windows(batch_size=16, sizes=[64] * 32, per_window=8)
    distinct = [len(set(shard_of(order(step), [64] * 32))) for step in range(200)]
    assert np.mean(distinct) == pytest.approx(8 * (1 - (7 / 8) ** 16), abs=0.3)  # with replacement, nearly


def test_the_spread_of_batch_means_is_the_documented_one():
    # One class a shard (a value for each shard), K shards of m rows, windows of N, batches of B.
    K, m, N, B = 40, 32, 8, 64
    values = np.random.default_rng(0).normal(size=K)
    means = [
        values[shard_of(windows(B, [m] * K, N, seed)(step), [m] * K)].mean()
        for seed in range(1500)
        for step in (1,)
    ]
    S = values.var(ddof=1)  # sampling without replacement: exact with this divisor
    of_windows = S / N * (1 - N / K)
    within = (values.var() - of_windows) / B * (N * m - B) / (N * m - 1)
    assert np.var(means) == pytest.approx(of_windows + within, rel=0.12)
    assert of_windows > 5 * within  # what the windows cost here, which the docstring warns of


def test_impossible_windows_are_refused():
    with pytest.raises(ValueError, match="n 0"):
        windows(sizes=[0, 0])
    with pytest.raises(ValueError, match="step -1"):
        windows()(-1)


def test_shares_are_whole_units_that_differ_by_one_at_most_and_cover_all():
    assert [share(1024, part, 3, 8) for part in range(3)] == [(0, 336), (336, 680), (680, 1024)]
    assert [share(64, part, 4, 8) for part in range(4)] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert [share(384, part, 2, 128) for part in range(2)] == [(0, 128), (128, 384)]
