"""Whether a teacher has collapsed: its pseudo-labels have come to be of few classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Entropy of the mean prediction in units of log C: 1 is balance; of 10 classes 6 equal ones have 0.78.
LEAST_ENTROPY = 0.8
LAST = 5  # records, of which the mean is taken


def collapse(records: Sequence[Mapping[str, float]]) -> str:
    """Return what the end of a learner's log says of a collapse, "" for balanced predictions.

    A set whose classes are far from balanced has a low entropy too.
    """
    last = [record for record in records if "class_entropy" in record][-LAST:]
    if not last:
        return ""
    entropy, above = (
        sum(record[key] for record in last) / len(last) for key in ("class_entropy", "above_threshold")
    )
    if entropy >= LEAST_ENTROPY:
        return ""
    return (
        f"the predictions of the unlabelled images are of few classes (entropy {entropy:.2f} of log C, "
        f"{above:.0%} of the images above their threshold): unless your classes are as unequal, the teacher "
        "has collapsed; lower semi_supervised.unlabelled_weight or learning_rate, or raise threshold"
    )
