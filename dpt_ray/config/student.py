"""The student: a small network for serving that learns from the run's classifier."""

from __future__ import annotations

from typing import Annotated, Literal

from dpt_ray.config.hashing import NotHashed
from dpt_ray.config.ladder import RungName
from dpt_ray.config.training import NetworkTraining
from dpt_ray.config.values import Positive, ViewsName

# The classifiers of a run by their nodes; `retrained` is stage 3's, `best` the best rung of the ladder.
TeacherName = Literal[
    "probe", RungName, "best", "learner", "generated_features", "retrained", "retrained_learner"
]


class StudentTraining(NetworkTraining):
    """The training of a student on the teacher's probabilities of all training images.

    - `temperature`: divides the decisions of teacher and student in the loss. At 1 the targets are the
      teacher's calibrated probabilities; a lower one sharpens them.
    - `views`: how a view differs from its image. "small_images" mirrors it and moves it by up to an eighth,
      "digits" does not mirror, "photographs" crops a random part.
    """

    lr_schedule: Literal["constant", "cosine"] = "cosine"
    temperature: Positive = 1.0
    views: ViewsName = "small_images"


class Student(StudentTraining):
    """A student, and which classifier of the run is its `teacher` (docs/semi_supervised.md).

    The default is stage 3's where images are generated, and that of `labels_from` where none are.
    """

    teacher: Annotated[TeacherName | None, NotHashed] = None
