"""The ladder of stage 1: the section, and the names of its rungs."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from dpt_ray.config.hashing import Section
from dpt_ray.config.sections import Count, Positive

# In the order of the ladder, which is also that of cost.
RungName = Literal["tuned_probe", "self_training", "balanced_self_training", "balanced_rounds", "propagation"]
RUNGS: tuple[RungName, ...] = get_args(RungName)
# What settings and the best rung are chosen on: validation images where there are any, or the few labels.
ChooseOn = Literal["validation", "labels"]
LabelsFrom = Literal["probe", RungName, "learner", "file", "best"]
Prior = (
    Literal["uniform", "estimated", "none"]
    | Annotated[tuple[Positive, ...], Field(strict=False, min_length=2)]
)


class Ladder(Section):
    """The rungs of stage 1 that are computed besides the probe, all on the features (docs/ladder.md).

    `neighbours` of each image make the graph of the rung `propagation`. `prior` is how many images each
    class has: "uniform" (as many of each), a list of shares in the order of the class names (they need
    not sum to 1), "estimated" from the probe's probabilities, or "none", with which nothing is balanced.
    `choose_on` "labels" leaves the validation images out of the choices of the rungs, which then rest on
    cross-validation over the few labels.
    """

    rungs: Annotated[tuple[RungName, ...], Field(strict=False, min_length=1)] = RUNGS
    neighbours: Count = 20
    prior: Prior = "uniform"
    choose_on: ChooseOn = "validation"
