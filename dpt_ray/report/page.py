"""The run's report: one HTML page that needs no other file, no network and no script."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.filesize import decimal

from dpt_ray.evaluation.methods import METHODS, ON_GENERATED_IMAGES, PILOT
from dpt_ray.evaluation.records import MetricRow
from dpt_ray.report.pictures import GridRow, grid_png, scale_to
from dpt_ray.report.plots import (
    MOST_BARS,
    AccuracyRow,
    Calibration,
    ClassRow,
    SweepRow,
    accuracy_bars,
    class_bars,
    reliability,
    sweep_lines,
    training_curve,
)

__all__ = [
    "AccuracyRow",
    "Calibration",
    "ClassRow",
    "Gain",
    "GridRow",
    "LabelQuality",
    "LadderRow",
    "ReportData",
    "StageRow",
    "SweepRow",
    "render_report",
]

PICTURE_PIXELS = 48  # a small image is magnified to about this side
GUTTER_SHARE = 12  # the white between images is a twelfth of their side
UNKNOWN = "–"


@dataclass(frozen=True)
class StageRow:
    """One stage: what it published, whether it was "made" or "reused", and what it cost."""

    name: str
    artifact: str
    status: str
    seconds: float
    startup_seconds: float
    rows: int | None
    bytes: int
    peak_memory_bytes: int | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True)
class Gain:
    """Which two accuracy rows the headline compares, and the uncertainty of their difference.

    `stderr` is a fraction; `kind` says what it is, for example "paired standard error".
    """

    baseline: str
    improved: str
    stderr: float
    kind: str


@dataclass(frozen=True)
class LabelQuality:
    """The pseudo-labels of a rung: what share of the `n` images of known label is right, and its spread.

    `ece` is their confidences' calibration error; `smallest` and `largest` are classes' shares of all
    pseudo-labels.
    """

    accuracy: float | None
    ece: float | None
    n: int
    smallest: float
    largest: float


@dataclass(frozen=True)
class LadderRow:
    """A rung: accuracies and paired gains (gain, standard error) as fractions, None where unknown.

    `score` is on the `n` images or labels of `chosen_on` ("" for validation images that decide nothing).
    """

    name: str
    chosen_on: str
    score: float | None
    score_stderr: float | None
    n: int
    test: float | None
    over_probe: tuple[float, float] | None
    over_balanced: tuple[float, float] | None
    seconds: float
    labels: LabelQuality | None = None


@dataclass(frozen=True)
class ReportData:
    """The content of the page as plain values; empty and None values are left out.

    Accuracies, precisions and calibration errors are fractions, times ISO 8601 strings. Without
    `gain` the headline compares the first accuracy row with the last and gives no uncertainty of
    the difference. `over_balanced` is DPT's gain over class-balanced self-training with its standard
    error; it stands beside any other. `student` says how the student compares with its teacher.
    `labels_from` is the rung that stage 2 has its labels from.
    """

    title: str
    config_yaml: str
    started: str
    finished: str
    versions: Mapping[str, str]
    hardware: str
    stages: Sequence[StageRow]
    n_labels: int
    n_validation_labels: int
    accuracies: Sequence[AccuracyRow] = ()
    gain: Gain | None = None
    over_balanced: tuple[float, float] | None = None
    student: str = ""
    ladder: Sequence[LadderRow] = ()
    advice: str = ""
    labels_from: str = ""
    sweep: Sequence[SweepRow] = ()
    pseudo_label_classes: Sequence[ClassRow] = ()
    pseudo_label_accuracy: float | None = None
    calibration: Calibration | None = None
    metrics: Sequence[MetricRow] = ()
    metrics_left_out: Sequence[str] = ()
    grid: Sequence[GridRow] = ()
    resampled: str = ""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    curve_note: str = ""
    quarantined: int = 0
    warnings: Sequence[str] = ()


# What of a headline is the method, and not stage 1 alone.
_OF_DPT = {METHODS[method].name for method in (*ON_GENERATED_IMAGES, PILOT)}


def render_report(data: ReportData) -> str:
    """Return the page. Raises ValueError where `gain` names no accuracy row or image sizes differ."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "hours": lambda hours: f"{hours:.2f}" if hours else UNKNOWN,
        "percent": percent,
        "with_error": with_error,
        "over_seeds": over_seeds,
        "points": points,
        "duration": duration,
        "size": size,
        "count": count,
        "iso_time": iso_time,
    }
    compared = _compared(data)
    difference, difference_kind = _difference(data, compared)
    tested = any(row.test is not None for row in data.accuracies)
    return environment.get_template("report.html").render(
        data=data,
        compared=compared,
        is_dpt=compared is not None and compared[1].name in _OF_DPT,
        with_top5=any(row.test_top5 is not None for row in data.accuracies),
        difference=difference,
        difference_kind=difference_kind,
        accuracy_plot=accuracy_bars(data.accuracies, compared[1].name if compared else "") if tested else "",
        pictures=[_picture_row(row) for row in data.grid if len(row.real) + len(row.generated)],
        pixelated=_pixelated(data.grid),
        sweep_plot=sweep_lines(data.sweep) if data.sweep else "",
        sweep_seeds=max((row.seeds for row in data.sweep), default=1),
        sweep_best=sorted(data.sweep, key=lambda row: -row.validation_top1),
        class_plot=class_bars(data.pseudo_label_classes),
        most_bars=MOST_BARS,
        calibration_plot=reliability(data.calibration) if data.calibration else "",
        curve_plots=[
            training_curve(name, points, number)
            for number, (name, points) in enumerate(data.curves.items())
            if points
        ],
        gpu_hours=sum(s.gpu_hours or 0.0 for s in data.stages),
        peak_memory=max((s.peak_memory_bytes or 0 for s in data.stages), default=0) or None,
    )


def percent(fraction: float | None, decimals: int = 1) -> str:
    """Return a fraction as "12.3 %" with a no-break space, a dash where it is unknown."""
    if fraction is None or math.isnan(fraction):
        return UNKNOWN
    return f"{100 * fraction:.{decimals}f}\u00a0%"


def with_error(row: AccuracyRow) -> str:
    """Return the test accuracy as "88.1 ± 1.4 %", without ± where the error is unknown."""
    if row.test is None or row.test_stderr is None:
        return percent(row.test)
    return f"{100 * row.test:.1f} ± {percent(row.test_stderr)}"


def over_seeds(row: SweepRow) -> str:
    """Return a setting's validation accuracy, with its standard error over seeds where there are several."""
    if row.stderr is None:
        return percent(row.validation_top1)
    return f"{100 * row.validation_top1:.1f} ± {percent(row.stderr)}"


def points(gain: tuple[float, float] | None) -> str:
    """Return a gain as "+1.3 ± 0.4", in points, a dash where it is unknown."""
    return UNKNOWN if gain is None else f"{100 * gain[0]:+.1f} ± {100 * gain[1]:.1f}"


def duration(seconds: float) -> str:
    """Return seconds as "4.2 s", "3 min 12 s" or "1 h 04 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,}\u00a0h {minutes:02d}\u00a0min"


def size(n_bytes: int | None) -> str:
    """Return bytes in decimal units, a dash where unknown."""
    return UNKNOWN if n_bytes is None else decimal(n_bytes, precision=2, separator="\u00a0")


def count(number: int | None) -> str:
    """Return a whole number with separators, a dash where unknown."""
    return UNKNOWN if number is None else f"{number:,}"


def iso_time(text: str) -> str:
    """Return an ISO 8601 time as "2025-01-31 14:05 UTC", to the minute."""
    moment = datetime.fromisoformat(text)
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def _compared(data: ReportData) -> tuple[AccuracyRow, AccuracyRow] | None:
    """Return the (baseline, improved) rows of the headline, None where nothing was tested."""
    tested = {row.name: row for row in data.accuracies if row.test is not None}
    if data.gain is None:
        # The student's row is the last one, and no step of the method.
        rows = [row for name, row in tested.items() if name != METHODS["student"].name]
        return (rows[0], rows[-1]) if rows else None
    for name in (data.gain.baseline, data.gain.improved):
        if name not in tested:
            raise ValueError(f"gain names {name!r}; rows with a test accuracy are {list(tested)}")
    return tested[data.gain.baseline], tested[data.gain.improved]


def _difference(data: ReportData, compared: tuple[AccuracyRow, AccuracyRow] | None) -> tuple[str, str]:
    """Return for example ("12.7 ± 1.5 points higher", "paired standard error"), or blanks."""
    if compared is None or compared[0] is compared[1]:
        return "", ""
    change = 100 * ((compared[1].test or 0.0) - (compared[0].test or 0.0))
    direction = "higher" if change >= 0 else "lower"
    if data.gain is None:
        return f"{abs(change):.1f} points {direction}", ""
    stderr = 100 * data.gain.stderr
    doubt = "; within two standard errors of no difference" if abs(change) < 2 * stderr else ""
    return f"{abs(change):.1f} ± {stderr:.1f} points {direction}", data.gain.kind + doubt


def _pixelated(grid: Sequence[GridRow]) -> bool:
    """Return whether images are magnified, in which case CSS must not smooth them."""
    shown = [row for row in grid if len(row.real) + len(row.generated)]
    return bool(shown) and scale_to(shown, PICTURE_PIXELS) > 1


def _picture_row(row: GridRow) -> dict[str, str | int]:
    """Return one class of the grid: its name and two strips as data URIs ("" where empty)."""

    def strip(images: GridRow) -> str:
        if not len(images.real) + len(images.generated):
            return ""
        scale = scale_to([images], PICTURE_PIXELS)
        side = scale * max([*images.real, *images.generated][0].shape[:2])
        png = grid_png([images], scale, gutter=max(2, side // GUTTER_SHARE))
        return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

    return {
        "class_name": row.class_name,
        "real": strip(GridRow(row.class_name, row.real, [])),
        "n_real": len(row.real),
        "generated": strip(GridRow(row.class_name, [], row.generated)),
        "n_generated": len(row.generated),
    }
