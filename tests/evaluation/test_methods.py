"""Methods are stored by key; studies that stored the displayed text stay readable."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dpt_ray.config.ladder import RUNGS
from dpt_ray.evaluation.methods import METHODS, method_key

STUDY = Path(__file__).parents[2] / "docs" / "results" / "digits_study.json"


def test_the_committed_study_is_readable():
    runs = json.loads(STUDY.read_text())["runs"]
    # 3 encoder seeds x 5 label draws x 3 numbers of labels, and 2 references for each encoder seed, of which
    # the one without labels has the ladder alone.
    found = Counter(method_key(row) for run in runs.values() for row in run["accuracy"])
    of_images = dict.fromkeys(("same_labels", "augmented", "dpt_paper", "dpt"), 45 + 3)
    assert found == of_images | dict.fromkeys(("probe", *RUNGS), 45 + 6)


def test_a_row_is_read_by_its_key_whatever_is_displayed():
    assert method_key({"method": "tuned_probe", "name": "any words"}) == "tuned_probe"


@pytest.mark.parametrize(
    "row", [{"name": "Oracle"}, {"method": "Oracle", "name": "DPT, chosen on validation"}]
)
def test_an_unknown_method_is_named(row):
    with pytest.raises(ValueError, match="'Oracle' is unknown; the methods are probe, tuned_probe"):
        method_key(row)


def test_no_two_methods_are_shown_alike():
    assert len({method.short for method in METHODS.values()}) == len(METHODS)
    assert len({method.name for method in METHODS.values()}) == len(METHODS)
