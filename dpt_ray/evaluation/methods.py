"""The compared methods: stored by key, with the text that tables show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method's text: `name` in tables of one run, `short` as a column of a study."""

    name: str
    short: str


# The free control that stands beside every gain, and what is measured before images are paid for.
BALANCED = "balanced_self_training"
PILOT = "generated_features"

# What is trained on generated images; nothing is held against these.
ON_GENERATED_IMAGES = ("dpt", "dpt_paper", "semi_supervised_dpt")

# In the order of a study's columns.
METHODS = {
    "probe": Method("Linear probe on the labels (stage 1)", "probe"),
    "tuned_probe": Method("Linear probe, l2 chosen on validation", "tuned probe"),
    "self_training": Method("Self-training on pseudo-labelled real images (control)", "self-training"),
    "balanced_self_training": Method(
        "Self-training, classes weighted equally (control)", "balanced self-training"
    ),
    "balanced_rounds": Method("Balanced self-training, four rounds", "four rounds"),
    "propagation": Method("Label propagation, then the balanced fit", "propagation"),
    "semi_supervised": Method("Semi-supervised learner (stage 1)", "semi-supervised"),
    "generated_features": Method("Stage 3 on generated features", "generated features"),
    # In a run with a ladder, whose rung self_training starts from the probe's labels.
    "same_labels": Method("The denoiser's pseudo-labels on real images (control)", "same labels, real"),
    "augmented": Method("Augmented labelled images (control)", "augmentation"),
    "dpt": Method("DPT, chosen on validation", "DPT"),
    "dpt_paper": Method("DPT, the configured setting (stage 3)", "DPT, paper's setting"),
    "semi_supervised_dpt": Method(
        "Semi-supervised learner with generated images (stage 3)", "DPT, semi-supervised"
    ),
    "student": Method("Student, distilled for serving", "student"),
}

# The methods of classifiers that `student.teacher` names by their nodes, where the two differ.
_METHOD_OF_TEACHER = {
    "learner": "semi_supervised",
    "retrained": "dpt_paper",
    "retrained_learner": "semi_supervised_dpt",
}

# Results until 2026-11-22, and gains until 2026-11-25, stored the displayed text of that time.
_KEY_OF_OLD_NAME = {
    "Linear probe on the labels (stage 1)": "probe",
    "Linear probe, l2 chosen on validation": "tuned_probe",
    "Self-training on pseudo-labelled real images (control)": "self_training",
    "Augmented labelled images (control)": "augmented",
    "DPT, chosen on validation": "dpt",
    "DPT, the configured setting (stage 3)": "dpt_paper",
}


def key_of(stored: str) -> str:
    """Return the method's key for a stored key or for the text in older results.

    Raises ValueError for a method that is not in METHODS.
    """
    key = _KEY_OF_OLD_NAME.get(stored, stored)
    if key not in METHODS:
        raise ValueError(f"method {stored!r} is unknown; the methods are {', '.join(METHODS)}")
    return key


def method_of_teacher(name: str) -> str:
    """Return the method's key for the name of a student's teacher."""
    return _METHOD_OF_TEACHER.get(name, name)


def method_key(row: Mapping[str, Any]) -> str:
    """Return the method key of an accuracy row of an evaluation or a study.

    Rows store it as `method`; older ones have the displayed text only, as `name`.
    """
    return key_of(row.get("method") or row["name"])


def method_of(row: Mapping[str, Any]) -> Method:
    """Return the text of an accuracy row's method."""
    return METHODS[method_key(row)]
