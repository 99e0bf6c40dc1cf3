"""The README's figure of a study."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dpt_ray.report.page import GridRow
from dpt_ray.report.pictures import grid_png
from dpt_ray.report.study_figure import Baseline, StudyPoint, study_figure
from tests.helpers.digit_rows import digit_rows


def study_points() -> list[StudyPoint]:
    methods = ("Probe on labels only", "Self-training control", "Augmentation control", "DPT")
    return [
        StudyPoint(labels, method, 0.62 + 0.06 * i + 0.04 * m, 0.025 - 0.006 * i)
        for m, method in enumerate(methods)
        for i, labels in enumerate((1, 2, 5))
    ]


def test_study_figure_shows_the_pictures_pixel_by_pixel() -> None:
    rows = digit_rows(4)
    figure = np.asarray(Image.open(io.BytesIO(study_figure(study_points(), rows))).convert("RGB"))
    assert figure.shape == (880, 2000, 3)
    # (880 - 80 - 40) // 10 - 6 = 70 pixels a row, so a digit of 8 pixels is magnified 8 times.
    strip = np.asarray(Image.open(io.BytesIO(grid_png(rows, 8, 6))))
    left = 2000 - 40 - strip.shape[1]
    assert (figure[80 : 80 + strip.shape[0], left : left + strip.shape[1]] == strip).all()


@pytest.mark.parametrize(("classes", "side", "channels"), [(10, 96, 3), (10, 256, 1), (2, 128, 3), (1, 8, 1)])
def test_study_figure_fits_pictures_of_any_size_beside_the_plot(
    classes: int, side: int, channels: int
) -> None:
    black = np.zeros((side, side, channels), dtype=np.uint8)
    rows = [GridRow(str(c), [black] * 4, [black] * 4) for c in range(classes)]
    alone = [StudyPoint(1, "DPT", 0.9, None)]
    figure = np.asarray(Image.open(io.BytesIO(study_figure(alone, rows))).convert("L"))
    assert figure.shape == (880, 2000)
    # For each of 10 rows (880 - 80 - 40) // 10 - 6 = 70 pixels, and for each of 8 images beside a plot as
    # wide as high (2000 - 40 - 120 - 40 - 130 - (880 - 80 - 230) - 24) // 8 - 6 = 128.
    shown = {10: 70, 2: 128, 1: 128}[classes]
    left = 2000 - 40 - 8 * (shown + 6) - 24
    assert (figure[80 + 6 : 80 + 6 + shown, left + 6 : left + 6 + shown] == 0).all()
    below = 80 + classes * (shown + 6) + 6
    assert (figure[below:, left:] == 255).all() and (figure[:, -40:] == 255).all()


def test_gains_are_drawn_around_zero_with_the_baseline_named(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    study_figure(study_points(), digit_rows(4), Baseline("probe", {1: 0.335, 2: 0.48, 5: 0.63}))
    axes = drawn[0]
    assert axes.get_title(loc="left").startswith("Points gained over the probe")
    assert next(label.get_text() for label in axes.get_xticklabels()) == "1  (probe 33.5 %)"
    label = axes.yaxis.get_major_formatter()
    assert (label(2.0, 0), label(-0.5, 0)) == ("+2", "-0.5")
    assert any(list(line.get_ydata()) == [0, 0] for line in axes.lines)


def test_without_pictures_the_plot_has_their_room(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    study_figure(study_points(), [])
    [axes] = drawn
    assert axes.get_position().width > 0.85


def test_pictures_that_are_all_real_are_called_test_images(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    rows = digit_rows(4)
    study_figure(study_points(), [GridRow(row.class_name, row.real, []) for row in rows])
    study_figure(study_points(), rows)
    words = [{text.get_text() for text in axes.texts} - {row.class_name for row in rows} for axes in drawn]
    assert words == [set(), {"test images"}, set(), {"real", "generated"}]
