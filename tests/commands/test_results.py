"""The printed tables, from results as they are stored now and as they were stored before."""

import copy

from rich.console import Console

from dpt_ray.commands.results import accuracy_table, label_table, ladder_table
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


def text(table, width=120):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def printed(result):
    return text(accuracy_table(result))


def test_methods_are_shown_by_name_and_the_gain_by_the_methods_that_it_compares():
    text = printed(NOW)
    assert "Linear probe, l2 chosen on validation" in text and "DPT, chosen on validation" in text
    assert "DPT - tuned probe: +0.012 +- 0.004 (paired)" in text


def test_older_results_with_displayed_names_are_shown_alike():
    assert printed(with_displayed_names(NOW)) == printed(NOW)


def test_the_page_shows_older_results_alike():
    old = with_displayed_names(NOW)
    assert (accuracy_rows(old), headline(old)) == (accuracy_rows(NOW), headline(NOW))


def test_balanced_self_training_stands_beside_the_gain_over_the_probe():
    balanced = NOW["gain"] | {"baseline": "balanced_self_training", "gain": -0.002}
    said = " ".join(printed(NOW | {"gains": [NOW["gain"], balanced]}).split())
    assert (
        "DPT - tuned probe: +0.012 +- 0.004; DPT - balanced self-training: -0.002 +- 0.004 (paired)" in said
    )


def test_the_ladder_says_on_what_each_rung_was_chosen_what_it_gains_and_what_it_took():
    rows = [
        {
            "method": "balanced_self_training",
            "chosen_on": "cross-validation",
            "score": 0.5,
            "score_stderr": 0.079,
            "n": 40,
            "test": 0.808,
            "over_probe": {"gain": 0.02, "stderr": 0.008},
            "over_balanced": None,
            "seconds": 1234.4,
        },
        {
            **dict.fromkeys(("score", "score_stderr", "test", "over_probe", "over_balanced")),
            **{"method": "propagation", "chosen_on": "none", "n": 0, "seconds": 8.0},
        },
    ]
    lines = [line.split("│")[1:-1] for line in text(ladder_table(rows), 200).splitlines() if "│" in line]
    found = [[cell.strip() for cell in line] for line in lines]
    first = ["cross-validation (40)", "0.500 +- 0.079", "0.808", "+0.020 +- 0.008", "-", "1,234"]
    assert found == [
        ["balanced self-training", *first],
        ["propagation", "none", "-", "-", "-", "-", "8"],
    ]


def test_the_pseudo_labels_of_each_rung_are_shown_and_a_row_without_any_is_left_out():
    known = {"accuracy": 0.556, "ece": 0.0512, "n": 47500, "smallest": 0.062, "largest": 0.141}
    unknown = known | {"accuracy": None, "ece": None, "n": 0}
    rows = [
        {"method": "probe", "labels": known},
        {"method": "propagation", "labels": unknown},
        {"method": "dpt", "labels": None},
    ]
    lines = [line.split("│")[1:-1] for line in text(label_table(rows), 200).splitlines() if "│" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["probe", "55.6%", "6.2%", "14.1%", "5.1%", "47,500"],
        ["propagation", "-", "6.2%", "14.1%", "-", "0"],
    ]
