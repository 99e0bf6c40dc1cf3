"""The report page."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dpt_ray.evaluation.methods import METHODS
from dpt_ray.evaluation.records import MetricRow
from dpt_ray.report.page import (
    AccuracyRow,
    Calibration,
    ClassRow,
    Gain,
    GridRow,
    ReportData,
    StageRow,
    SweepRow,
    duration,
    render_report,
    size,
)
from dpt_ray.report.plots import sweep_lines
from tests.helpers.digit_rows import digit_rows

PROBE, DPT = "Probe on labels only (stage 1)", METHODS["dpt"].name
VOID = {"meta", "img", "br", "link", "input", "hr"}


def metric(*values: Any) -> MetricRow:
    return MetricRow(**dict(zip(MetricRow.__annotations__, values, strict=True)))


def full_data() -> ReportData:
    rng = np.random.default_rng(1)
    sweep = [
        SweepRow(method, k, weight, l2, min(0.97, 0.74 + gain * np.log2(k) / 70 + bonus), False)
        for method, gain in (("DPT", 1.4), ("Augmented labels only", 0.5))
        for weight, bonus in ((1.0, 0.0), (10.0, 0.021), ("balanced", 0.043))
        for k in (1, 4, 16, 64, 256)
        for l2 in (0.0025, 0.025)
    ] + [SweepRow("Self-training on pseudo-labels", None, w, 0.0025, 0.79, False) for w in (1.0, 9.0)]
    sweep[24] = dataclasses.replace(sweep[24], chosen=True)
    bins = np.linspace(0.15, 0.97, 10)
    made = [
        ("index", 2.1, 1797, 91_000, None),
        ("pretrain", 412.5, None, 9_400_000, 1_320_000_000),
        ("extract", 14.8, 1257, 6_200_000, 610_000_000),
        ("fit-classifier", 1.9, 10, 12_000, None),
        ("train-diffusion", 4105.0, 1257, 31_000_000, 2_020_000_000),
        ("generate", 310.2, 2560, 1_900_000, 900_000_000),
    ]
    return ReportData(
        title="digits, 1 label per class",
        config_yaml="data:\n  labels_per_class: 1\n  comment: <script>alert(1)</script>\n",
        started="2026-01-31T09:05:00+00:00",
        finished="2026-01-31T10:26:10+00:00",
        versions={"python": "3.12.3", "torch": "2.14.0", "ray": "2.60.0", "git": "1a2b3c4"},
        hardware="2 CPU cores, 8 GB",
        stages=[
            StageRow(name, f"{name}/1a2b3c", "reused" if i == 0 else "made", s, 1.2, n, b, m)
            for i, (name, s, n, b, m) in enumerate(made)
        ],
        n_labels=10,
        n_validation_labels=50,
        accuracies=[
            AccuracyRow(PROBE, 0.74, 0.754, 540),
            AccuracyRow("Self-training on pseudo-labels (control)", 0.79, 0.781, 540),
            AccuracyRow("Augmented labels only (control)", 0.78, 0.772, 540),
            AccuracyRow("DPT (stage 3), paper's setting", 0.84, 0.846, 540, "real weight 1"),
            AccuracyRow(DPT, 0.88, 0.881, 540, "64 per class, balanced", 0.992),
        ],
        gain=Gain(PROBE, DPT, 0.0147, "paired standard error"),
        sweep=sweep,
        pseudo_label_classes=[
            ClassRow(str(c), 0.62 + 0.035 * c, 0.95 - 0.04 * ((c * 3) % 10), 120 + c)
            for c in range(10)
        ],
        pseudo_label_accuracy=0.7683,
        calibration=Calibration(
            1.83, 0.142, 0.031, 540,
            [(float(b), float(max(0, b - 0.16)), int(10 + 90 * b**3)) for b in bins],
            [(float(b), float(b + rng.normal(0, 0.03)), int(10 + 80 * b)) for b in bins],
        ),
        metrics=[
            metric("Fréchet distance", name, value, None, n, 600, "own encoder", "digits test", "none")
            for name, value, n in (("generated", 18.4217, 2560), ("real against real (floor)", 2.113, 628))
        ] + [
            metric("FID", "generated", 7.5, None, 2560, None, "Inception", "adm.npz", "tensorflow"),
            metric("KID", "generated", 0.0123, 0.0021, 600, 600, "Inception", "digits test", "tensorflow"),
        ],
        metrics_left_out=["sFID needs mu_s and sigma_s, which adm.npz has not"],
        grid=digit_rows(8),
        curves={
            "pretrain loss": [(i * 10, 4 * 0.99**i + 0.6 + rng.normal(0, 0.03)) for i in range(500)],
            "denoiser loss": [(i * 100, 0.9 / (1 + i) + 0.05 * rng.uniform(1, 1.3)) for i in range(900)],
        },
        quarantined=3,
        warnings=["validation has 5 images per class; the chosen setting is uncertain"],
    )  # fmt: skip


def bare_data() -> ReportData:
    """A run without sweep, ground truth, pictures or calibration."""
    full = full_data()
    return ReportData(
        title=full.title,
        config_yaml=full.config_yaml,
        started=full.started,
        finished=full.finished,
        versions=full.versions,
        hardware=full.hardware,
        stages=full.stages,
        n_labels=10,
        n_validation_labels=0,
    )


class Page(HTMLParser):
    """Collects elements, text and ids, and fails on an end tag that closes nothing open."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text.append(" " if tag in ("td", "th", "text") else "")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def headings(self) -> set[str]:
        return {attrs["id"] for attrs in self.all("h2")}

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def source() -> str:
    return render_report(full_data())


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_page_asks_for_nothing_outside_itself(source: str, page: Page) -> None:
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "audio", "video"}
    for tag, attrs in page.elements:
        for key in ("src", "srcset", "href", "xlink:href", "data", "poster"):
            if key in attrs and tag != "a":
                assert attrs[key].startswith(("data:image/png;base64,", "#")), (tag, key)
        assert not any(key.startswith("on") for key in attrs)
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", source))


def test_every_reference_inside_the_page_meets_exactly_one_id(source: str, page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", source)
    used += [a["xlink:href"][1:] for t, a in page.elements if t == "use"]
    used += [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert used
    assert set(used) <= set(ids)


def test_the_headline_gives_both_accuracies_the_gain_and_the_labels(page: Page) -> None:
    # sqrt(.881 * .119 / 540) = 1.39 %, sqrt(.754 * .246 / 540) = 1.85 %
    assert (
        "From 10 labelled images (and 50 more for validation), Dual Pseudo Training reaches "
        "88.1 ± 1.4 % test accuracy, 12.7 ± 1.5 points higher (paired standard error) than the "
        f"75.4 ± 1.9 % of “{PROBE}”."
    ) in page.words


def test_a_gain_inside_its_error_and_a_loss_are_called_so() -> None:
    data = full_data()
    doubtful = dataclasses.replace(data, gain=Gain(PROBE, DPT, 0.07, "paired standard error"))
    assert "within two standard errors of no difference" in Page(render_report(doubtful)).words
    worse = dataclasses.replace(data, gain=Gain(DPT, PROBE, 0.01, "paired standard error"))
    assert "12.7 ± 1.0 points lower" in Page(render_report(worse)).words


def test_without_a_gain_the_headline_is_the_last_method_and_not_the_student() -> None:
    rung, data = AccuracyRow(METHODS["propagation"].name, 0.8, 0.812, 540), full_data()
    nothing_generated = dataclasses.replace(data, accuracies=[*data.accuracies[:3], rung], gain=None)
    assert f"“{rung.name}” reaches 81.2 ± 1.7 %" in Page(render_report(nothing_generated)).words
    student = AccuracyRow(METHODS["student"].name, 0.5, 0.512, 540)
    data = dataclasses.replace(data, accuracies=[*data.accuracies, student], gain=None)
    headline = render_report(data).partition('class="headline"')[2].partition("</p>")[0]
    assert "88.1" in headline and "51.2" not in headline


def test_a_gain_between_rows_that_are_not_there_is_refused() -> None:
    data = dataclasses.replace(full_data(), gain=Gain("nobody", DPT, 0.01, "paired"))
    with pytest.raises(ValueError, match="'nobody'"):
        render_report(data)


def test_the_numbers_of_every_section_are_on_the_page(page: Page) -> None:
    for expected in (
        "84.6 %",  # accuracy of the paper's setting
        "99.2 %",  # top-5
        "76.8 % of the probe’s pseudo-labels agree",
        "temperature of 1.83",
        "14.2 % before, 3.1 % after",
        "18.42",  # Frechet distance
        "real against real (floor)",
        "FID generated 7.5 2,560 – Inception adm.npz tensorflow",  # a count that the file does not tell
        "0.0123 ± 0.0021",
        "Not computed: sFID needs mu_s and sigma_s, which adm.npz has not.",
        "1 h 08 min",  # 4105 s of train-diffusion
        "1 h 21 min",  # the sum: 4846.5 s is 80.8 minutes
        "2.02 GB",  # the largest memory
        "3 unreadable images were set aside",
        "2026-01-31 09:05 UTC to 2026-01-31 10:26 UTC",
        "2.14.0",
        "the chosen setting is uncertain",
    ):
        assert expected in page.words, expected


def test_the_page_spells_out_the_method_and_says_its_language(page: Page) -> None:
    assert "Dual Pseudo Training" in page.words
    assert page.all("html")[0]["lang"] == "en"


def test_pictures_and_plots_have_text_for_those_who_do_not_see_them(page: Page) -> None:
    assert len(page.all("img")) == 20
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert page.all("img")[1]["alt"] == "8 generated images of class 0"
    plots = page.all("svg")
    assert len(plots) == 6
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 20 for attrs in plots)
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))


def test_plots_take_every_colour_from_the_page(source: str) -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert "var(--series-0)" in plots
    assert "var(--ink)" in plots
    assert re.findall(r"(?:fill|stroke): (#[0-9a-f]{3,6})", plots) == []
    variables = set(re.findall(r"var\((--[a-z0-9-]+)\)", source))
    for block in source.split("prefers-color-scheme: dark")[:2]:
        assert variables <= set(re.findall(r"(--[a-z0-9-]+):", block))


def test_sections_without_data_are_left_out(page: Page) -> None:
    assert page.headings == {
        "h-accuracy", "h-pictures", "h-sweep", "h-pseudo", "h-calibration",
        "h-metrics", "h-curves", "h-cost", "h-config", "h-versions",
    }  # fmt: skip
    bare = Page(render_report(bare_data()))
    assert bare.headings == {"h-cost", "h-config", "h-versions"}
    assert "no more for validation" in bare.words
    assert "measures no test accuracy" in bare.words
    assert "Warnings" not in bare.words
    assert "set aside" not in bare.words


def test_the_caption_says_that_the_calibration_was_measured_where_it_was_fitted(page: Page) -> None:
    assert "The temperature, one number, was fitted on these very images" in page.words


def test_names_from_the_data_cannot_become_markup() -> None:
    evil = '<b>"&$x_{$'
    picture = np.zeros((8, 8, 3), np.uint8)
    data = dataclasses.replace(
        full_data(),
        title=evil,
        grid=[GridRow(evil, [picture], [picture])],
        pseudo_label_classes=[ClassRow(evil, 0.5, 0.5, 3)],
        curves={evil: [(0, 1.0), (1, 0.5)]},
        curve_note=evil,
    )
    source = render_report(data)
    page = Page(source)
    assert page.all("b") == []
    assert page.all("script") == []
    assert page.all("img")[0]["alt"] == f"1 real image of class {evil}"
    assert page.words.count(evil) >= 7  # title twice, grid, bar, table, curve twice, note
    assert "<script>alert(1)</script>" in page.words  # the configuration, as text


def test_accuracies_measured_on_validation_only_make_a_table_without_bars() -> None:
    rows = [AccuracyRow(PROBE, 0.74, None, 0)]
    page = Page(render_report(dataclasses.replace(bare_data(), accuracies=rows)))
    assert "74.0 %" in page.words
    assert page.all("svg") == []


def test_a_thousand_classes_show_the_least_precise_bars_and_all_in_the_table() -> None:
    classes = [ClassRow(f"class {c}", (c * 7 % 1000) / 1000, None, 5) for c in range(1000)]
    classes.append(ClassRow("never given", None, 0.0, 0))
    page = Page(render_report(dataclasses.replace(bare_data(), pseudo_label_classes=classes)))
    spoken = page.all("svg")[0]["aria-label"]
    # 7 * 143 = 1001, so class 143 * p has precision p / 1000 (modulo 1000).
    assert spoken.startswith("Bars of pseudo-label precision per class: class 0 0 %, class 143 0 %")
    assert spoken.count("class ") == 30
    assert "The 30 least precise of 1,001 classes" in page.words
    assert "never given – 0.0 % 0" in page.words


def test_a_sweep_over_methods_without_extra_images_is_drawn() -> None:
    sweep = [SweepRow("Probe", None, 1, 0.1, 0.75, True), SweepRow("Probe", None, 1, 1.0, 0.5)]
    page = Page(render_report(dataclasses.replace(bare_data(), sweep=sweep)))
    assert len(page.all("svg")) == 1
    assert "Probe – 1 0.1 75.0 % yes" in page.words


def test_a_sweep_over_seeds_is_drawn_with_error_bars_and_tabled_with_errors() -> None:
    rows = [SweepRow("DPT", k, 1.0, 0.1, 0.8 + k / 160, k == 8, 3, 0.004) for k in (2, 4, 8)]
    rows.append(SweepRow("Self-training", None, 1.0, 0.1, 0.75))
    words = Page(render_report(dataclasses.replace(bare_data(), sweep=rows))).words
    assert "DPT 8 1 0.1 85.0 ± 0.4 % yes" in words and "Self-training – 1 0.1 75.0 %" in words
    assert "A point is the mean over 3 seeds" in words
    # Two caps at each of the three points; bars so short leave the ticks as they are.
    short = [dataclasses.replace(row, stderr=row.stderr and 1e-5) for row in rows]
    alone = [dataclasses.replace(row, seeds=1, stderr=None) for row in rows]
    assert sweep_lines(short).count("<use ") - sweep_lines(alone).count("<use ") == 2 * 3


def test_classes_of_equal_precision_keep_their_order() -> None:
    classes = [ClassRow("b", 0.5, 0.5, 1), ClassRow("a", 0.5, 0.5, 1), ClassRow("c", 0.25, 1, 4)]
    page = Page(render_report(dataclasses.replace(bare_data(), pseudo_label_classes=classes)))
    assert page.all("svg")[0]["aria-label"].endswith("per class: c 25 %, b 50 %, a 50 %.")


def test_curves_with_infinities_without_any_number_and_over_decades_are_drawn() -> None:
    curves = {"loss": [(0, float("inf")), (1, 2.0), (2, 1.0)], "lost": [(0, float("nan"))]}
    curves["fall"] = [(0, 1000.0), (1, 0.5)]
    page = Page(render_report(dataclasses.replace(bare_data(), curves=curves)))
    spoken = [attrs["aria-label"] for attrs in page.all("svg")]
    assert spoken == [
        "Line plot of loss, from 2 at step 1 to 1 at step 2.",
        "Line plot of lost, without a finite value.",
        "Line plot of fall, from 1e+03 at step 0 to 0.5 at step 1.",
    ]
    assert " 100 " in page.words  # a tick of the logarithmic axis
    assert "$" not in page.words


def test_the_same_data_gives_the_same_page(source: str) -> None:
    assert render_report(full_data()) == source


def test_the_strip_on_the_page_holds_the_digits(page: Page) -> None:
    strip = page.all("img")[0]["src"].removeprefix("data:image/png;base64,")
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip))))
    first = np.clip(load_digits().images[0] * 15.9, 0, 255).astype(np.uint8)
    assert (image[4:52:6, 4:52:6, 0] == first).all()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.23, "4.2 s"), (59.96, "1 min 00 s"), (192, "3 min 12 s"), (3840, "1 h 04 min"),
     (3599.7, "1 h 00 min")],
)  # fmt: skip
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (12_340, "12.34 kB"), (2 * 10**12, "2.00 TB")]
)
def test_sizes_are_decimal(n_bytes: int, text: str) -> None:
    assert size(n_bytes).replace("\u00a0", " ") == text
