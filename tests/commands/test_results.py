"""The printed tables, from results as they are stored now and as they were stored before."""

import copy

from rich.console import Console

from dpt_ray.commands.results import accuracy_table
from dpt_ray.stages.report import accuracy_rows, headline

ROW = {"note": "", "validation": 0.9, "n_validation": 200, "test": 0.8, "test_top5": None, "n_test": 600}
NOW = {
    "n_labels": 10,
    "accuracy": [ROW | {"method": method} for method in ("tuned_probe", "dpt")],
    "gain": {"baseline": "tuned_probe", "improved": "dpt", "gain": 0.012, "stderr": 0.004, "kind": "paired"},
    "pseudo_labels": None,
    "frechet": [],
    "image_metrics": {"rows": [], "left_out": []},
}
# As they were stored, whatever is displayed now.
OLD_NAMES = {"tuned_probe": "Linear probe, l2 chosen on validation", "dpt": "DPT, chosen on validation"}


def with_displayed_names(result):
    """The result as it was stored before: displayed names in the gain, and in rows without a key."""
    old = copy.deepcopy(result)
    for row in old["accuracy"]:
        row["name"] = OLD_NAMES[row.pop("method")]
    for role in ("baseline", "improved"):
        old["gain"][role] = OLD_NAMES[old["gain"][role]]
    return old


def printed(result):
    console = Console(width=120)
    with console.capture() as captured:
        console.print(accuracy_table(result))
    return captured.get()


def test_methods_are_shown_by_name_and_the_gain_by_the_methods_that_it_compares():
    text = printed(NOW)
    assert "Linear probe, l2 chosen on validation" in text and "DPT, chosen on validation" in text
    assert "DPT - tuned probe: +0.012 +- 0.004 (paired)" in text


def test_older_results_with_displayed_names_are_shown_alike():
    assert printed(with_displayed_names(NOW)) == printed(NOW)


def test_the_page_shows_older_results_alike():
    old = with_displayed_names(NOW)
    assert (accuracy_rows(old), headline(old)) == (accuracy_rows(NOW), headline(NOW))
