"""The README's figure: accuracies or gains by labels per class, beside real and generated images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from dpt_ray.report.pictures import GAP_IN_GUTTERS, GridRow, Pixels, grid_png, scale_to
from dpt_ray.report.plots import INK, MARKERS, SERIES, STYLE

DPI = 200
WIDTH, HEIGHT = 2000, 880  # pixels
MARGIN, HEADING, GUTTER = 40, 80, 6
PLOT_LEFT, PLOT_BOTTOM, NAMES = 130, 230, 120
FIGURE_STYLE = STYLE | {"figure.facecolor": "white", "savefig.facecolor": "white"}


@dataclass(frozen=True)
class StudyPoint:
    """Mean test accuracy or gain (fractions) of a method over its runs, with its standard error."""

    labels_per_class: int
    method: str
    mean: float
    stderr: float | None


@dataclass(frozen=True)
class Baseline:
    """The method that gains are over: its name, and its accuracy (a fraction) by labels per class."""

    name: str
    accuracy: Mapping[int, float]


@matplotlib.rc_context(FIGURE_STYLE)
def study_figure(
    points: Sequence[StudyPoint], rows: Sequence[GridRow], baseline: Baseline | None = None
) -> bytes:
    """Return a PNG, 2000 x 880: left the accuracies, right a row of images for each class, if there are any.

    With a `baseline` the points are gains over it, which are paired: their errors are smaller than those of
    accuracies, most of which all methods share.
    Methods keep the order in which they appear. Images are magnified or shrunk to what room there is
    beside a plot no narrower than high. Raises ValueError for images of different sizes.
    """
    plot_height = HEIGHT - HEADING - PLOT_BOTTOM
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
    if not rows:
        plot_width = WIDTH - 2 * MARGIN - PLOT_LEFT
        _points(_axes(figure, PLOT_LEFT, HEADING, plot_width, plot_height), points, baseline)
        return _png(figure)
    side = _side(rows, WIDTH - MARGIN - NAMES - MARGIN - PLOT_LEFT - plot_height)
    rows = [
        replace(
            row,
            real=[_within(side, image) for image in row.real],
            generated=[_within(side, image) for image in row.generated],
        )
        for row in rows
    ]
    strip = Image.open(io.BytesIO(grid_png(rows, scale_to(rows, side), GUTTER)))
    strip_left = WIDTH - MARGIN - strip.width
    plot_width = strip_left - NAMES - MARGIN - PLOT_LEFT
    _points(_axes(figure, PLOT_LEFT, HEADING, plot_width, plot_height), points, baseline)
    _pictures(_axes(figure, strip_left, HEADING, strip.width, strip.height), strip, rows)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _side(rows: Sequence[GridRow], width: int) -> int:
    """Return the largest side of an image, in pixels, at which all of them fit beside the plot."""
    n_columns = max(len(row.real) for row in rows) + max(len(row.generated) for row in rows)
    gap = GAP_IN_GUTTERS * GUTTER
    return min((HEIGHT - HEADING - MARGIN) // len(rows), (width - gap) // n_columns) - GUTTER


def _within(side: int, image: Pixels) -> Pixels:
    """Return the image, shrunk if it is larger than `side`."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def _points(axes: Axes, points: Sequence[StudyPoint], baseline: Baseline | None) -> None:
    methods = list(dict.fromkeys(point.method for point in points))
    groups = sorted({point.labels_per_class for point in points})
    apart = min(0.16, 0.84 / len(methods))
    for m, method in enumerate(methods):
        mine = [point for point in points if point.method == method]
        shift = apart * (m - (len(methods) - 1) / 2)
        axes.errorbar(
            [groups.index(point.labels_per_class) + shift for point in mine],
            [100 * point.mean for point in mine],
            yerr=[100 * (point.stderr or 0.0) for point in mine],
            label=method,
            color=SERIES[m % len(SERIES)],
            marker=MARKERS[m % len(MARKERS)],
            linestyle="none",
            markersize=7,
            elinewidth=1.6,
            capsize=4,
        )
    names = [str(group) for group in groups]
    if baseline:
        names = [f"{group}  ({baseline.name} {100 * baseline.accuracy[group]:.1f} %)" for group in groups]
        axes.axhline(0, color=INK, linewidth=1)
    axes.set_xticks(range(len(groups)), names)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    for border in np.arange(0.5, len(groups) - 1):
        axes.axvline(border, color=axes.xaxis.get_gridlines()[0].get_color(), linewidth=0.8)
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+g}" if baseline else f"{value:.0f} %")
    )
    axes.set_xlabel("labels per class")
    errors = any(point.stderr is not None for point in points)
    what = f"Points gained over the {baseline.name}" if baseline else "Test accuracy"
    axes.set_title(what + (" (mean ± standard error)" if errors else ""), pad=14 * 72 / DPI)
    columns = 2 if len(methods) <= 6 else 3
    axes.legend(loc="upper left", bbox_to_anchor=(-0.03, -0.16), ncols=columns, columnspacing=1.5)


def _pictures(axes: Axes, strip: Image.Image, rows: Sequence[GridRow]) -> None:
    # The axes are as large as the picture in pixels, so nothing is resampled.
    axes.imshow(np.asarray(strip), interpolation="none", aspect="auto")
    axes.set_axis_off()
    n_real = max(len(row.real) for row in rows)
    n_generated = max(len(row.generated) for row in rows)
    gap = (GAP_IN_GUTTERS - 1) * GUTTER if n_real and n_generated else 0
    column = (strip.width - GUTTER - gap) / (n_real + n_generated)
    heading: dict[str, Any] = {"y": -14, "va": "bottom", "weight": "bold", "color": INK}
    if n_real:
        axes.text(x=GUTTER, s="real" if n_generated else "test images", **heading)
    if n_generated:
        axes.text(x=GUTTER + n_real * column + gap, s="generated", **heading)
    for r, row in enumerate(rows):
        middle = GUTTER / 2 + (r + 0.5) * (strip.height - GUTTER) / len(rows)
        axes.text(-10, middle, row.class_name, ha="right", va="center")


def _axes(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Return axes at these pixels, counted from the figure's upper left corner."""
    bottom = HEIGHT - top - height
    return figure.add_axes((left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT))
