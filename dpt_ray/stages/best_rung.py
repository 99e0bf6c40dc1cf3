"""best: the rung of the ladder, the probe among them, that is best on validation."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated

from dpt_ray.config.hashing import HashedIfSet, Settings
from dpt_ray.config.ladder import RUNGS, ChooseOn
from dpt_ray.data.rows import PSEUDO_LABELS_FILE
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.learners.linear_classifier import CONFIG, WEIGHTS
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

FALLBACK = "balanced_self_training"


class BestRungSettings(Settings):
    """What the rungs' scores rest on."""

    choose_on: Annotated[ChooseOn, HashedIfSet] = "validation"


class BestRung(Stage[BestRungSettings]):
    """The files of the best rung, and in its manifest which one it is."""

    artifact = "rung"
    settings = BestRungSettings
    inputs = reads(
        {
            "classifier": one_of("classifier"),
            "pseudo_labels": one_of("pseudo_labels"),
            **{name: one_of("rung", optional=True) for name in RUNGS},
        }
    )

    @classmethod
    def make(cls, task: Task[BestRungSettings]) -> Facts:
        """Choose and publish.

        The rungs' own scores decide: on validation images, else by cross-validation, which the probe
        itself has not (the tuned probe has). A tie goes to the cheaper rung. Where nothing could be
        chosen on, it is balanced self-training if there is that rung, which was better than the probe with
        every encoder that was measured (docs/ladder.md), else the probe.
        """
        probe = task.inputs["classifier"]
        on_validation = task.settings.choose_on == "validation"
        scores: dict[str, float | None] = {
            "probe": probe.manifest["validation_top1"] if on_validation else None
        }
        rungs: dict[str, Artifact] = {name: task.inputs[name] for name in RUNGS if name in task.inputs}
        scores |= {name: rung.manifest["rung"]["top1"] for name, rung in rungs.items()}
        known = {name: score for name, score in scores.items() if score is not None}
        unknown = FALLBACK if FALLBACK in rungs else "probe"
        best = max(known, key=lambda name: known[name]) if known else unknown
        if not known:
            logging.getLogger("dpt_ray").warning(
                "%s: no validation images to choose on, and a class with one label: nothing can be "
                "compared, and the pseudo-labels of %s are taken; labels_from names another rung",
                task.name,
                best,
            )
        if best == "probe":
            labels = task.inputs["pseudo_labels"]
            _copy(task.out, labels=labels, classifier=probe)
            facts = probe.manifest
            chosen: Facts = {
                "labelled": facts["labelled"],
                "n_validation": facts["n_validation"],
                "validation_top1": facts["validation_top1"],
                "rows": labels.manifest["rows"],
                "calibration": labels.manifest["calibration"],
            }
        else:
            _copy(task.out, labels=rungs[best], classifier=rungs[best])
            facts = rungs[best].manifest
            chosen = {key: facts[key] for key in KEPT}  # type: ignore[assignment, literal-required]
        return {**chosen, "best": best}


KEPT = ("labelled", "n_validation", "validation_top1", "validation_nll", "rung", "rows", "calibration")


def _copy(out: Artifact, *, labels: Artifact, classifier: Artifact) -> None:
    def write(folder: Path) -> None:
        shutil.copyfile(labels.local_file(PSEUDO_LABELS_FILE), folder / PSEUDO_LABELS_FILE)
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(classifier.local_file(name), folder / name)

    out.publish_files(write)
