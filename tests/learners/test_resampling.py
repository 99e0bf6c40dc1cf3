"""Images that are sampled again until a classifier takes them for their class."""

import numpy as np
import pytest

from dpt_ray.config.sections import Resample
from dpt_ray.learners.resampling import resample, sampled_in_all

# Rows are images, columns attempts: the confidence in the image's own class; from 0.5 on it passes.
CONFIDENCES = np.array(
    [
        [0.9, 0.1, 0.1, 0.1],  # passes at once
        [0.1, 0.2, 0.7, 0.9],  # passes at the third attempt, though the fourth would be surer
        [0.1, 0.3, 0.2, 0.1],  # never passes, and is surest at the second
        [0.4, 0.1, 0.2, 0.3],  # never passes, and is surest at first
    ]
)
LABELS = np.array([2, 0, 1, 0])


def drawn(rows, attempts=4):
    """Resample some of the images; also which attempts at which of them were drawn."""
    asked = []

    def sample(places, attempt):
        asked.append((attempt, [rows[place] for place in places]))
        return np.array([[rows[place], attempt] for place in places], np.uint8)

    def judge(images, labels):
        assert [LABELS[row] for row, _ in images] == labels.tolist()
        confidence = np.array([CONFIDENCES[row, attempt] for row, attempt in images])
        return confidence, confidence >= 0.5

    how = Resample(min_confidence=0.5, attempts=attempts)
    return resample(sample, judge, LABELS[rows], how), asked


def test_an_image_is_the_first_attempt_that_passes_else_the_surest():
    found, asked = drawn([0, 1, 2, 3])
    assert found.attempt.tolist() == [0, 2, 1, 0]
    assert found.passes.tolist() == [True, True, False, False]
    assert found.images.tolist() == [[0, 0], [1, 2], [2, 1], [3, 0]]
    assert asked == [(0, [0, 1, 2, 3]), (1, [1, 2, 3]), (2, [1, 2, 3]), (3, [2, 3])]


@pytest.mark.parametrize("attempts", [2, 3, 4])
def test_what_was_sampled_is_counted(attempts):
    found, asked = drawn([0, 1, 2, 3], attempts)
    assert sampled_in_all(found.attempt, found.passes, attempts) == sum(len(rows) for _, rows in asked)


def test_an_image_depends_on_its_own_attempts_only():
    together, _ = drawn([0, 1, 2, 3])
    for row in range(4):
        alone, _ = drawn([row])
        assert [part[0].tolist() for part in alone] == [part[row].tolist() for part in together]


def test_nothing_is_sampled_again_where_all_pass():
    found, asked = drawn([0, 0])
    assert asked == [(0, [0, 0])] and found.passes.all()
