import numpy as np
import pytest

from dpt_ray.training.order import batch_rows


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
