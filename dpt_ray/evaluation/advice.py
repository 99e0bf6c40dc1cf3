"""What the ladder says of the next step: whether generation has been shown to help."""

from __future__ import annotations

from collections.abc import Sequence

from dpt_ray.evaluation.methods import PILOT
from dpt_ray.evaluation.records import LadderRow

ERRORS = 2.0  # standard errors that a difference must exceed: about 95 % of chance stays within


def advice(rows: Sequence[LadderRow]) -> str:
    """Return a recommendation on generated images from the pilot's row, "" without a pilot to judge.

    It rests on the validation images alone, and never acts by itself.
    """
    row = next((row for row in rows if row["method"] == PILOT), None)
    if row is None or "over_balanced_validation" not in row:
        return ""
    if (found := row["over_balanced_validation"]) is None:
        return (
            "none. Without balanced self-training in the ladder and validation images "
            "(data.validation) nothing tells whether generation helps"
        )
    gain, error = 100 * found["gain"], 100 * found["stderr"]
    measured = (
        f"generated features are {gain:+.1f} +- {error:.1f} points over balanced self-training on the "
        f"{found['n']:,} validation images"
    )
    if gain > ERRORS * error:
        return f"go on. {measured}, more than {ERRORS:g} errors: generation helps here"
    if gain < -ERRORS * error:
        return f"stop before images. {measured}: generation harms here"
    return (
        f"stop before images, which cost much more. {measured}, within {ERRORS:g} errors: "
        "nothing is shown to be gained"
    )
