"""What is told of a stage that runs, while its storage comes and goes."""

import threading

from dpt_ray.engine.progress import following


def test_progress_is_followed_through_a_storage_that_is_away_for_a_moment():
    reads, told, again = iter(["away", 3, "away", "away", 5]), [], threading.Event()

    def read():
        value = next(reads, 5)
        if value == "away":
            raise RuntimeError("the endpoint cannot be reached")  # as botocore's, no OSError
        return value

    def progress(done, total):
        told.append((done, total))
        if done == 5:
            again.set()

    with following(progress, 10, read, every=0.01):
        assert again.wait(10)
    assert told[:2] == [(3, 10), (5, 10)]
