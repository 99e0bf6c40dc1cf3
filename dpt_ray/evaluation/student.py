"""What a student loses or gains against its teacher, and how much less it computes, in one sentence."""

from __future__ import annotations

from dpt_ray.evaluation.methods import METHODS
from dpt_ray.evaluation.records import StudentResult


def student_text(found: StudentResult) -> str:
    """Return the sentence; both networks are an encoder with its classifier."""
    gain, teacher = found["gain"], METHODS[found["teacher"]].name
    against = f"The student's teacher is “{teacher}”"
    if gain:
        against = (
            f"On the same test images the student is {100 * gain['gain']:+.1f} ± {100 * gain['stderr']:.1f} "
            f"points against its teacher, “{teacher}”"
        )
    few, many = found["parameters"], found["teacher_parameters"]
    less, more = found["flops"], found["teacher_flops"]
    return (
        f"{against}; it has {few:,} parameters ({few / many:.2g} times the teacher's {many:,}) and takes "
        f"{less / 1e6:,.3g} MFLOP for an image ({less / more:.2g} times {more / 1e6:,.3g})"
    )
