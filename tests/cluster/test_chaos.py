"""The short form of tests/chaos.py: a run some of whose processes are killed at random."""

import pytest

from tests.chaos import differences, disturbed, undisturbed_run


@pytest.mark.cluster
def test_a_run_that_is_killed_at_random_publishes_what_an_undisturbed_one_does(tmp_path):
    expected = undisturbed_run(tmp_path / "undisturbed")
    chaos = disturbed(tmp_path / "disturbed", seed=1, kills=5)
    assert len(chaos.killed) == 5, chaos.killed
    assert differences(chaos.run, expected) == []
