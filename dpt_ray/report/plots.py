"""The report's plots, each an `<svg>` element for an HTML page.

Colours are CSS variables of the page (`--ink`, `--series-0`, ...), so that a plot works in light and
dark mode. Text stays text, and the ids of different plots differ.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from dpt_ray.evaluation.paired import binomial_stderr

INK, FAINT, PAPER = "#1b1f24", "#d5d9de", "#fdfdfc"
# After Okabe and Ito's colour-blind safe set, darkened to 3:1 on white. Series also differ in
# marker and dash, never in colour alone.
SERIES = ("#0072b2", "#c65200", "#00805c", "#a3477f", "#8a6100", "#56616c")
NEUTRAL = SERIES[5]
CSS_VARIABLES = {INK: "--ink", FAINT: "--faint", PAPER: "--paper"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
DASHES = ("-", "--", ":", "-.")

STYLE = {
    "font.size": 9.5,
    "font.sans-serif": ["DejaVu Sans"],  # used for the layout; browsers without it substitute theirs
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class name may hold a dollar sign
}
WIDTH = 4.7  # inches; the viewBox is 338 units wide, so 9.5 pt stays readable on a phone
MOST_BARS = 30
MOST_POINTS = 400

SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


@dataclass(frozen=True)
class AccuracyRow:
    """Top-1 of one classifier as fractions; `test` is over `n_test` images, None if unknown.

    `test_top5` is None where there are no more than five classes.
    """

    name: str
    validation: float | None
    test: float | None
    n_test: int
    note: str = ""
    test_top5: float | None = None

    @property
    def test_stderr(self) -> float | None:
        """The binomial standard error of `test`."""
        if self.test is None or self.n_test == 0:
            return None
        return binomial_stderr(self.test, self.n_test)


@dataclass(frozen=True)
class SweepRow:
    """One setting; `images_per_class` is None for a method that uses no extra images.

    `validation_top1` is the mean of its trials, one for each of `seeds`, and `stderr` its standard error over
    them, None with one seed.
    """

    method: str
    images_per_class: int | None
    real_weight: float | str
    l2_scale: float
    validation_top1: float
    chosen: bool = False
    seeds: int = 1
    stderr: float | None = None

    @property
    def weight(self) -> str:
        """The real weight as a word or a number without needless zeros."""
        return self.real_weight if isinstance(self.real_weight, str) else f"{self.real_weight:g}"


@dataclass(frozen=True)
class ClassRow:
    """Pseudo-labels of one class: fractions (None where undefined) and how many were given."""

    name: str
    precision: float | None
    recall: float | None
    count: int


@dataclass(frozen=True)
class Calibration:
    """Temperature scaling of the confidences; bins are (confidence, accuracy, count).

    Before and after are of the `n` images that the temperature was fitted on.
    """

    temperature: float
    ece_before: float
    ece_after: float
    n: int
    bins_before: Sequence[tuple[float, float, int]]
    bins_after: Sequence[tuple[float, float, int]]


@matplotlib.rc_context(STYLE)
def accuracy_bars(rows: Sequence[AccuracyRow], highlight: str) -> str:
    """Return horizontal bars of test accuracy with binomial standard errors."""
    known = [row for row in rows if row.test is not None]
    figure, axes = _figure(0.46 * len(known) + 0.55)
    for y, row in enumerate(known):
        test, stderr = 100 * (row.test or 0.0), 100 * (row.test_stderr or 0.0)
        colour = SERIES[0] if row.name == highlight else NEUTRAL
        alpha = 1 if row.name == highlight else 0.7
        axes.barh(y, test, height=0.42, color=colour, alpha=alpha)
        axes.errorbar(test, y, xerr=stderr, fmt="none", ecolor=INK, elinewidth=1.4, capsize=3)
        axes.text(0, y - 0.31, _short(row.name, 60), va="bottom")
        axes.text(test + stderr + 1.5, y, f"{test:.1f}", va="center", weight="bold")
    axes.set(ylim=(len(known) - 0.7, -0.85), xlim=(0, 112), yticks=[])
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("test accuracy (%)")
    axes.spines["left"].set_visible(False)
    spoken = "; ".join(f"{row.name} {100 * (row.test or 0.0):.1f} %" for row in known)
    return _inline_svg(figure, "accuracy", f"Bar chart of test accuracy: {spoken}.")


@matplotlib.rc_context(STYLE)
def sweep_lines(rows: Sequence[SweepRow]) -> str:
    """Return validation accuracy against images per class, a line per method and real weight.

    Of several L2 penalties at one point the best is drawn, with a bar of a standard error over its seeds; a
    method without extra images is a horizontal line at its best. The chosen settings are ringed.
    """
    best: dict[tuple[str, str], dict[int, SweepRow]] = {}
    level: dict[str, float] = {}
    for row in rows:
        if row.images_per_class is None:
            level[row.method] = max(100 * row.validation_top1, level.get(row.method, 0.0))
        else:
            line = best.setdefault((row.method, row.weight), {})
            there = line.setdefault(row.images_per_class, row)
            if row.validation_top1 > there.validation_top1:
                line[row.images_per_class] = row
    methods = list(dict.fromkeys(method for method, _ in best))
    weights = list(dict.fromkeys(weight for _, weight in best))
    sizes = sorted({size for line in best.values() for size in line})

    figure, axes = _figure(2.7 + 0.17 * (len(best) + len(level)))
    for (method, weight), line in best.items():
        m, w = methods.index(method), weights.index(weight)
        at, colour = sorted(line), SERIES[w % len(SERIES)]
        top1 = [100 * line[size].validation_top1 for size in at]
        if errors := [100 * stderr for size in at if (stderr := line[size].stderr) is not None]:
            axes.errorbar(at, top1, errors, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3)
        axes.plot(
            at,
            top1,
            color=colour,
            marker=MARKERS[m % len(MARKERS)],
            linestyle=DASHES[m % len(DASHES)],
            markersize=5,
            label=f"{method}, real weight {weight}",
        )
    for i, (method, value) in enumerate(level.items()):
        axes.axhline(value, color=INK, linewidth=1, linestyle=DASHES[(i + 1) % 4], label=method)
    _ring_chosen(axes, rows, sizes)
    if sizes and sizes[0] > 0 and sizes[-1] > 8 * sizes[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y")
    axes.set(xlabel="images per class added in stage 3", ylabel="validation accuracy (%)")
    figure.legend(loc="outside lower left")
    spoken = "; ".join(
        f"{method} at real weight {weight}: "
        + ", ".join(f"{100 * line[size].validation_top1:.1f} % with {size}" for size in sorted(line))
        for (method, weight), line in best.items()
    )
    return _inline_svg(figure, "sweep", f"Validation accuracy against images per class. {spoken}.")


def _ring_chosen(axes: Axes, rows: Sequence[SweepRow], sizes: Sequence[int]) -> None:
    label = "chosen on validation"
    for row in rows:
        if row.chosen:
            x = row.images_per_class if row.images_per_class is not None else (sizes or [1])[-1]
            ring: dict[str, Any] = {"s": 130, "facecolors": "none", "edgecolors": INK, "linewidths": 1.6}
            axes.scatter([x], [100 * row.validation_top1], zorder=5, label=label, **ring)
            label = ""


@matplotlib.rc_context(STYLE)
def class_bars(rows: Sequence[ClassRow]) -> str:
    """Return bars of pseudo-label precision per class, least precise first, with recall as a marker.

    Shows the `MOST_BARS` least precise classes; returns "" where no precision is known.
    """
    known = [row for row in rows if row.precision is not None]
    shown = sorted(known, key=lambda row: row.precision or 0.0)[:MOST_BARS]
    if not shown:
        return ""
    figure, axes = _figure(0.21 * len(shown) + 0.95)
    y = range(len(shown))
    axes.barh(y, [row.precision or 0.0 for row in shown], color=SERIES[0], label="precision")
    recall = [(i, row.recall) for i, row in enumerate(shown) if row.recall is not None]
    axes.scatter(
        [value for _, value in recall],
        [i for i, _ in recall],
        marker="D",
        s=24,
        facecolors=PAPER,
        edgecolors=INK,
        zorder=3,
        clip_on=False,
        label="recall",
    )
    axes.set_yticks(y, [_short(row.name, 22) for row in shown])
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=2, reverse=True)
    spoken = ", ".join(f"{row.name} {100 * (row.precision or 0.0):.0f} %" for row in shown)
    return _inline_svg(figure, "classes", f"Bars of pseudo-label precision per class: {spoken}.")


@matplotlib.rc_context(STYLE)
def reliability(calibration: Calibration) -> str:
    """Return the reliability diagram: accuracy against confidence before and after scaling."""
    figure, axes = _figure(3.6, width=4.2)
    axes.plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle="--", label="perfect")
    curves = (
        ("before", calibration.bins_before, calibration.ece_before, SERIES[1], "s", PAPER),
        ("after", calibration.bins_after, calibration.ece_after, SERIES[0], "o", SERIES[0]),
    )
    for name, bins, ece, colour, marker, face in curves:
        filled = [(confidence, accuracy, n) for confidence, accuracy, n in bins if n > 0]
        if not filled:
            continue
        confidence, accuracy, counts = zip(*filled, strict=True)
        areas = [20 + 140 * n / max(counts) for n in counts]
        marks: dict[str, Any] = {
            "marker": marker,
            "facecolors": face,
            "edgecolors": colour,
            "linewidths": 1.5,
        }
        axes.plot(confidence, accuracy, color=colour, linewidth=1)
        axes.scatter(confidence, accuracy, s=areas, clip_on=False, zorder=3, **marks)
        # An empty plot for the legend, whose marker has a fixed size.
        axes.scatter([], [], s=36, label=f"{name} (ECE {100 * ece:.1f} %)", **marks)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid()
    axes.legend(loc="upper left")
    spoken = (
        "Reliability diagram: expected calibration error "
        f"{100 * calibration.ece_before:.1f} % before and {100 * calibration.ece_after:.1f} % "
        f"after temperature scaling with T = {calibration.temperature:.3g}."
    )
    return _inline_svg(figure, "reliability", spoken)


@matplotlib.rc_context(STYLE)
def training_curve(name: str, points: Sequence[tuple[int, float]], number: int) -> str:
    """Return one curve over training steps; the y axis is logarithmic if it spans 10 or more.

    Non-finite values are left out; at most about `MOST_POINTS` are drawn, always including the last.
    `number` distinguishes the plots of one page.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    stride = max(1, math.ceil(len(finite) / MOST_POINTS))
    drawn = finite[::-1][::stride][::-1]
    figure, axes = _figure(2.3, width=4.0)
    steps, values = [step for step, _ in drawn], [value for _, value in drawn]
    axes.plot(steps, values, linewidth=1.4, marker="o" if len(drawn) == 1 else "")
    if values and min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")
    ticks = MaxNLocator(5, integer=True) if len(drawn) > 1 else FixedLocator(steps)
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("step")
    axes.set_title(_short(name, 44))
    spoken = (
        f"from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}"
        if drawn
        else "without a finite value"
    )
    return _inline_svg(figure, f"curve{number}", f"Line plot of {name}, {spoken}.")


def _figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Return the figure as an `<svg>` element whose ids no figure of another `name` has."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # salts the ids of clip paths and markers
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = ElementTree.fromstring(buffer.getvalue())
    for element in svg.iter():
        if element.tag == f"{{{SVG}}}g":
            element.attrib.pop("id", None)  # unreferenced, and the same in every figure ("axes_1")
        if style := element.get("style"):
            for colour, variable in CSS_VARIABLES.items():
                style = style.replace(f": {colour}", f": var({variable})")
            element.set("style", style)
    svg.attrib = {
        "role": "img",
        "aria-label": alt,
        "viewBox": svg.attrib["viewBox"],
        # 7 rem per inch, so that text has the same size in every plot on a wide page.
        "style": f"max-width: {7 * figure.get_figwidth():.1f}rem",
    }
    return ElementTree.tostring(svg, "unicode")
