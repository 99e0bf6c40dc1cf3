"""A sweep's trials whose processes are lost are run again, whatever Tune has heard of them."""

from types import SimpleNamespace

from ray.exceptions import ActorDiedError

from dpt_ray.cluster.trials import _all_that_began


def test_a_trial_that_died_before_it_told_anything_is_run_again():
    tried = []

    def run(trials, name):
        tried.append(list(trials))
        lost = {"b", "d"} if len(tried) == 1 else {"d"} if len(tried) == 2 else set()
        return [
            SimpleNamespace(metrics={"trial_id": "x"}, config=None, error=ActorDiedError())
            if trial in lost
            else SimpleNamespace(metrics={"began": 1.0}, config={"trial": trial}, error=None)
            for trial in trials
        ]

    assert _all_that_began(run, ["a", "b", "c", "d"], "sweep") == [1.0] * 4
    assert tried == [["a", "b", "c", "d"], ["b", "d"], ["d"]]
