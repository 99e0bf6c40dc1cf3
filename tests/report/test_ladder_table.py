"""The ladder in the report: the rungs, their gains and their pseudo-labels."""

import dataclasses
import re

from dpt_ray.report.page import LabelQuality, LadderRow, render_report
from tests.report.test_page import full_data


def test_the_ladder_is_a_table_and_the_balanced_control_stands_beside_the_headline() -> None:
    rungs = [
        LadderRow("Probe", "", 0.74, 0.031, 200, 0.788, None, (-0.02, 0.008), 7.0),
        LadderRow("Balanced", "validation", 0.75, 0.0306, 200, 0.808, (0.02, 0.008), None, 65.0),
        LadderRow(
            *("Spread", "none", None, None, 0, None, None, None, 8.0),
            LabelQuality(0.556, 0.0512, 47500, 0.062, 0.141),
        ),
    ]
    data = dataclasses.replace(
        full_data(), ladder=rungs, over_balanced=(0.021, 0.017), labels_from="Spread", advice="stop"
    )
    page = render_report(data)
    assert "class-balanced self-training" in page and "+2.1 ± 1.7 points" in page
    assert "as it was before any image: stop.</p>" in page
    assert "Stage 2 has its pseudo-labels from “Spread”." in page
    minute = "1\u00a0min 05\u00a0s"
    found = page.split('aria-label="Ladder table"')[1].split("</table>")[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found.split("<tr>")[2:]]
    assert cells == [
        ["Probe", "validation (200)", "74.0 ± 3.1\u00a0%", "78.8\u00a0%", "–", "-2.0 ± 0.8", "7.0\u00a0s"],
        ["Balanced", "validation (200)", "75.0 ± 3.1\u00a0%", "80.8\u00a0%", "+2.0 ± 0.8", "–", minute],
        ["Spread", "none", "–", "–", "–", "–", "8.0\u00a0s"],
    ]
    found = page.split('aria-label="Table of the rungs’ pseudo-labels"')[1].split("</table>")[0]
    [cells] = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in found.split("<tr>")[2:]]
    percents = [f"{value}\u00a0%" for value in ("55.6", "6.2", "14.1", "5.1")]
    assert cells == ["Spread", *percents, "47,500"]

    without = render_report(full_data())
    assert "adder" not in without and "class-balanced" not in without
