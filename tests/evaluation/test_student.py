"""The sentence on a student, from results as they are stored."""

import pytest

from dpt_ray.evaluation.student import student_text

FOUND = {
    "teacher": "dpt_paper",
    "gain": {"gain": -0.0125, "stderr": 0.004},
    "parameters": 5_000,
    "teacher_parameters": 100_000,
    "flops": 2_500_000,
    "teacher_flops": 10_000_000,
}


def test_the_loss_and_the_size_are_told_beside_the_teachers():
    assert student_text(FOUND) == (
        "On the same test images the student is -1.2 ± 0.4 points against its teacher, “DPT, the configured "
        "setting (stage 3)”; it has 5,000 parameters (0.05 times the teacher's 100,000) and takes 2.5 MFLOP "
        "for an image (0.25 times 10)"
    )


@pytest.mark.parametrize("teacher", ["probe", "semi_supervised_dpt"])
def test_without_test_images_the_sizes_remain(teacher):
    text = student_text(FOUND | {"gain": None, "teacher": teacher})
    assert text.startswith("The student's teacher is “") and "points" not in text and "5,000" in text
