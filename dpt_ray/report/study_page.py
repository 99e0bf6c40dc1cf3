"""A study as a Markdown page: records of its comparisons, rendered by the template study.md.j2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dpt_ray.evaluation.paired import PairedGain, half_interval


@dataclass(frozen=True)
class Row:
    """One row of a table: its name, and a value or None for each column after the first."""

    name: str
    values: tuple[PairedGain | None, ...]


@dataclass(frozen=True)
class Table:
    """Rows under `columns`, the first of which has the rows' names."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Comparison:
    """Paired gains of one method over others, over all runs and, with several seeds, by encoder seed."""

    method: str
    over_all: Table
    by_seed: Table | None


@dataclass(frozen=True)
class Choice:
    """The settings that the methods chose from, on validation images.

    `swept` are those that chose from the grid, "" where no sweep was made; `tuned_probe` and `ladder` are
    whether that and the ladder's other fits chose their penalty. `filters` are the least confidences of
    generated images, where these were filtered, and none for all images; `sampled` is how further sets of
    images were sampled, `seeds` with how many seeds each set was.
    """

    n_validation: int
    swept: str
    tuned_probe: bool
    ladder: bool
    images_per_class: tuple[int, ...]
    real_weights: tuple[float | str, ...]
    l2: tuple[float, ...]
    filters: tuple[float | str, ...] = ()
    sampled: tuple[str, ...] = ()
    seeds: int = 1


@dataclass(frozen=True)
class TestError:
    """Standard errors over the test images at one number of labels: of a top-1, of one run's gain."""

    per_class: int
    top1: float
    gain: float | None


@dataclass(frozen=True)
class Distances:
    """Frechet distances by denoiser, with what they rest on."""

    n_generated: str
    n_reference: str
    reference: str
    extractor: str
    resize: str
    table: Table
    floor: float


@dataclass(frozen=True)
class VariantRow:
    """A method of a variant at one number of labels, beside the same method of the base."""

    per_class: int
    variant: str
    method: str
    top1: PairedGain
    of_base: PairedGain
    over_base: PairedGain


@dataclass(frozen=True)
class VariantDistance:
    """The Frechet distance of a variant at one number of labels, beside that of the base."""

    per_class: int
    variant: str
    distance: PairedGain
    of_base: PairedGain
    over_base: PairedGain


@dataclass(frozen=True)
class Variants:
    """What the variants change (JSON by name), the methods that differ by it, and the distances."""

    changes: dict[str, str]
    rows: tuple[VariantRow, ...]
    distances: tuple[VariantDistance, ...]


@dataclass(frozen=True)
class LadderRow:
    """A method at one number of labels, with its paired gains over the probe and balanced self-training."""

    per_class: int
    method: str
    top1: PairedGain
    over_probe: PairedGain | None
    over_balanced: PairedGain | None


@dataclass(frozen=True)
class StudyPage:
    """All that the page shows. Accuracies and gains are fractions; the page has them in points."""

    name: str
    command: str
    seconds: int
    code: str
    n_test: int
    seeds: int
    draws: int
    choice: Choice | None
    cross_validated: bool
    accuracies: Table
    ladder: tuple[LadderRow, ...]
    test_errors: tuple[TestError, ...]
    tested_gain: tuple[str, str] | None
    gains: tuple[Comparison, ...]
    distances: Distances | None
    several_extractors: bool
    variants: Variants | None


def render_study(page: StudyPage) -> str:
    """Return the page as Markdown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, of the study's own configuration
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"points": points, "gain": gain, "distance": distance, "half": half_interval}
    return environment.get_template("study.md.j2").render(page=page)


def points(found: PairedGain | None, sign: str = "") -> str:
    """Return a fraction with its standard error, in points, "" for None."""
    return _with_error(found, 100, f"{sign}.2f")


def gain(found: PairedGain | None) -> str:
    """Return a difference in points with the number of runs above 0, "" for None."""
    return f"{points(found, '+')} ({found.positive}/{found.total})" if found else ""


def distance(found: PairedGain | None, sign: str = "") -> str:
    """Return a Frechet distance with its standard error, "" for None."""
    return _with_error(found, 1, f"{sign}.3f")


def _with_error(found: PairedGain | None, scale: int, form: str) -> str:
    if found is None:
        return ""
    error = "" if found.stderr is None else f" ± {scale * found.stderr:{form.lstrip('+')}}"
    return f"{scale * found.mean:{form}}{error}"
