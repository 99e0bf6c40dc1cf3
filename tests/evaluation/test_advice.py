"""The recommendation on generated images rests on the pilot's gain on validation images alone."""

import pytest

from dpt_ray.evaluation.advice import advice

TEST = {"gain": 0.5, "stderr": 0.001}  # of which nothing may be seen


def rows(found):
    return [
        {"method": "probe"},
        {"method": "generated_features", "over_balanced": TEST, "over_balanced_validation": found},
    ]


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (0.061, "go on. generated features are +6.1 +- 3.0 points over balanced self-training on the 1,000"),
        (0.059, "stop before images, which cost much more. generated features are +5.9 +- 3.0 points"),
        (-0.059, "within 2 errors: nothing is shown to be gained"),
        (
            -0.061,
            "-6.1 +- 3.0 points over balanced self-training on the 1,000 validation images: generation harms",
        ),
    ],
)
def test_the_pilot_must_gain_more_than_two_errors(gain, words):
    assert words in advice(rows({"gain": gain, "stderr": 0.03, "n": 1000}))


def test_without_validation_images_nothing_is_recommended():
    assert advice(rows(None)).startswith("none. Without")


def test_without_a_pilot_nothing_is_said():
    assert advice(rows(None)[:1]) == "" == advice([])
