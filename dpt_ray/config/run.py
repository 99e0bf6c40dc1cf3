"""The configuration of a run: one YAML file, validated as a whole before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from dpt_ray.config.evaluate import Evaluate
from dpt_ray.config.features import FeatureDiffusion, GenerateIn
from dpt_ray.config.ladder import LabelsFrom, Ladder
from dpt_ray.config.sections import (
    Autoencoder,
    Classifier,
    Compute,
    Data,
    Diffusion,
    Encoder,
    Generate,
    Labels,
    Retrain,
    Section,
)
from dpt_ray.config.semi_supervised import SemiSupervised
from dpt_ray.config.student import Student
from dpt_ray.config.sweep import OtherSampling, Sweep
from dpt_ray.config.training import SelfSupervised
from dpt_ray.config.yaml_file import ConfigError, build, merge, parse_overrides, read_yaml


class Config(Section):
    """A whole run.

    `output` is a folder or URI. The default is `outputs` in the current folder; for a job on a one-machine
    cluster it is `dpt_ray_outputs` in the home folder, because a job's working folder is removed.

    `labels_from` is the rung of the ladder whose pseudo-labels stage 2 trains on, and the control of stage
    3 that trains on them as they are: the paper's `probe`, a rung's name, or `best` (on validation). A
    `classifier.learner` other than linear is a rung too, `learner`, and the default where it is configured.
    With `file` they are the user's: `pseudo_labels_file` is a table of id, label, confidence (CSV or Parquet)
    with a row for every training image, for example of a zero-shot classifier.

    `generate_in` is what stage 2 generates: images, as the paper; the encoder's features, in minutes; or
    both, the features first (docs/ladder.md).
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str | None = None
    data: Data
    labels: Labels
    encoder: Encoder = Encoder()
    pretrain: SelfSupervised | None = None
    autoencoder: Autoencoder = Autoencoder()
    classifier: Classifier = Classifier()
    semi_supervised: SemiSupervised | None = None
    ladder: Ladder | None = None
    labels_from: LabelsFrom = "probe"
    pseudo_labels_file: str | None = None
    generate_in: GenerateIn = "images"
    feature_diffusion: FeatureDiffusion = FeatureDiffusion()
    diffusion: Diffusion
    generate: Generate
    retrain: Retrain
    sweep: Sweep | None = None
    student: Student | None = None
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()

    @model_validator(mode="before")
    @classmethod
    def _labels_of_the_learner(cls, values: Any) -> Any:
        classifier = values.get("classifier") if isinstance(values, dict) else None
        learner = classifier.get("learner") if isinstance(classifier, dict) else None
        if learner in (None, "linear") or values.get("labels_from") is not None:
            return values
        return values | {"labels_from": "learner"}

    @model_validator(mode="after")
    def _learner(self) -> Config:
        learner, section = self.classifier.learner, self.semi_supervised
        if learner == "linear":
            if self.labels_from == "learner":
                raise ValueError(
                    "labels_from learner needs another classifier.learner than linear: freematch or semi_vit"
                )
            return self
        if section is None:
            raise ValueError(f"classifier.learner {learner} needs a semi_supervised section: its training")
        if learner == "freematch" and section.threshold != "adaptive":
            raise ValueError(
                f"semi_supervised.threshold {section.threshold}: freematch has adaptive ones: leave it out"
            )
        if learner == "freematch" and section.mixup:
            raise ValueError(
                "semi_supervised.mixup: freematch mixes no labelled images: leave it out, or take semi_vit"
            )
        if learner != "supervised" and section.supervised_steps >= section.steps:
            raise ValueError(
                f"semi_supervised.supervised_steps {section.supervised_steps} of {section.steps} steps: none "
                "is left for the unlabelled images: set fewer, or classifier.learner=supervised"
            )
        workers, groups = self.compute.train_workers, section.batch_size // section.group
        if groups < workers:
            raise ValueError(
                f"semi_supervised.batch_size {section.batch_size} has {groups} groups of {section.group} for "
                f"compute.train_workers ({workers}), and each takes at least one: set a larger batch_size, a "
                "smaller group or fewer workers"
            )
        return self

    @model_validator(mode="after")
    def _student_and_teacher(self) -> Config:
        if self.student and self.teacher not in self.teachers:
            raise ValueError(
                f"student.teacher {self.teacher}: this run makes no such classifier: name one of "
                f"{', '.join(self.teachers)}, or configure what makes it"
            )
        return self

    @model_validator(mode="after")
    def _across_sections(self) -> Config:
        if self.encoder.kind == "pretrain" and self.pretrain is None:
            raise ValueError("encoder.kind pretrain needs a pretrain section")
        kinds = {"encoder.kind": self.encoder.kind, "autoencoder.kind": self.autoencoder.kind}
        published = [f"{key} {kind}" for key, kind in kinds.items() if kind in ("msn", "timm", "kl")]
        if self.data.mode == "L" and published:
            raise ValueError(
                f"data.mode L does not fit {published[0]}, which takes colour: set data.mode RGB"
            )
        if (self.labels_from == "file") != (self.pseudo_labels_file is not None):
            raise ValueError(
                f"labels_from {self.labels_from} and pseudo_labels_file {self.pseudo_labels_file}: set both "
                "labels_from=file and the table, or neither"
            )
        without_ladder = ("probe", "learner", "file")
        if self.labels_from not in without_ladder and self.ladder is None:
            raise ValueError(f"labels_from {self.labels_from} needs a ladder section: add `ladder: {{}}`")
        rungs = self.ladder.rungs if self.ladder else ()
        if self.labels_from not in (*without_ladder, "best", *rungs):
            raise ValueError(
                f"labels_from {self.labels_from} is not among ladder.rungs ({', '.join(rungs)}): add it there"
            )
        asked = max([self.retrain.images_per_class, *(self.sweep or self.retrain_grid).images_per_class])
        if asked > self.generate.images_per_class:
            raise ValueError(
                f"retrain and sweep ask for {asked} images per class, but generate.images_per_class "
                f"is {self.generate.images_per_class}: raise it or ask for fewer"
            )
        if self.generate.resample and not self.retrains:
            raise ValueError(
                "generate.resample judges generated images of a class, and this run has none: leave it out, "
                "or set generate_in=images or both and another diffusion.condition than none"
            )
        self._check_other_samples()
        self._check_guidance()
        trained = {
            "pretrain": self.pretrain,
            "semi_supervised": self.semi_supervised,
            "diffusion": self.diffusion,
            "feature_diffusion": self.feature_diffusion if self.generates_features else None,
            "student": self.student,
            "evaluate.referee": self.evaluate.referee,
        }
        for name, section in trained.items():
            if section and section.batch_size % (8 * max(1, self.compute.train_workers)):
                raise ValueError(
                    f"{name}.batch_size {section.batch_size} must be a multiple of 8 x "
                    f"compute.train_workers ({self.compute.train_workers})"
                )
        if self.encoder.kind == "pretrain" and self.pretrain:
            groups = self.pretrain.batch_size // self.pretrain.contrast_group
            if groups < self.compute.train_workers:
                raise ValueError(
                    f"pretrain.batch_size {self.pretrain.batch_size} has {groups} groups of "
                    f"contrast_group {self.pretrain.contrast_group} for compute.train_workers "
                    f"({self.compute.train_workers}), and each takes at least one: set a larger "
                    "batch_size, a smaller contrast_group or fewer workers"
                )
        parts = 8 * max(1, self.compute.train_workers) * self.compute.gradient_accumulation
        if self.diffusion.batch_size % parts:
            raise ValueError(
                f"diffusion.batch_size {self.diffusion.batch_size} must be a multiple of 8 x "
                f"compute.train_workers ({self.compute.train_workers}) x compute.gradient_accumulation "
                f"({self.compute.gradient_accumulation})"
            )
        self._check_images()
        return self

    def _check_other_samples(self) -> None:
        """Raise ValueError where the sweep samples the same set of images twice."""
        seen = [self.generate]
        for number, other in enumerate(self.sweep.generate if self.sweep else ()):
            if self.further_seeds and other.seed is not None:
                raise ValueError(
                    f"sweep.generate.{number}.seed {other.seed}: with sweep.seeds above 1 every set has "
                    "generate.seed and the seeds after it: leave this one out"
                )
            changed = Generate.model_validate(self.generate.model_dump() | other.changes)
            if changed in seen:
                raise ValueError(
                    f"sweep.generate.{number} ({other.name}) is sampled as another set of the run: change "
                    "another setting of it, or leave it out"
                )
            seen.append(changed)

    def _check_guidance(self) -> None:
        """Raise ValueError for guidance of a network that did not learn classes, or the null class."""
        others = self.sweep.generate if self.sweep else ()
        asked: dict[str, float | None] = {"generate": self.generate.guidance}
        asked |= {f"sweep.generate.{number}": other.guidance for number, other in enumerate(others)}
        stage2 = self.diffusion
        trained_here = not (stage2.weights or stage2.init_from)
        for name, guidance in asked.items():
            if guidance in (None, 1) or not self.generates_images:
                continue
            if stage2.condition == "none":
                raise ValueError(
                    f"{name}.guidance {guidance:g} leads to a class, and diffusion.condition none has none: "
                    "set it to 1"
                )
            if trained_here and not stage2.label_dropout and stage2.min_confidence is None:
                raise ValueError(
                    f"{name}.guidance {guidance:g} leads away from the null class, which "
                    "diffusion.label_dropout 0 does not train: set that above 0, or the guidance to 1"
                )

    def _check_images(self) -> None:
        """Raise ValueError where the images do not suit a network that is trained on them."""
        size, patches = self.data.image_size, {}
        if self.autoencoder.kind == "identity":
            patches["diffusion.model"] = self.diffusion.model.patch_size
        for name, section in {"pretrain": self.pretrain, "evaluate.referee": self.evaluate.referee}.items():
            if section and section.patch_size:
                patches[name] = section.patch_size
            if section and section.augmentation == "photographs" and self.data.mode == "L":
                raise ValueError(
                    f"{name}.augmentation photographs changes colours and data.mode is L: set data.mode RGB "
                    "or augmentation digits"
                )
        evaluate = self.evaluate
        if evaluate.controls and evaluate.augmentation == "photographs" and self.data.mode == "L":
            raise ValueError(
                "evaluate.augmentation photographs changes colours and data.mode is L: set data.mode RGB, "
                "augmentation digits or controls false"
            )
        if self.student and self.student.patch_size:
            patches["student"] = self.student.patch_size
        for name, patch in patches.items():
            if size % patch:
                raise ValueError(f"{name}.patch_size {patch} must divide data.image_size {size}")

    @property
    def generates_images(self) -> bool:
        """Whether stage 2 generates images."""
        return self.generate_in != "features"

    @property
    def generates_features(self) -> bool:
        """Whether stage 2 generates features."""
        return self.generate_in != "images"

    @property
    def trains_learner(self) -> bool:
        """Whether stages 1 and 3 have a learner that trains the encoder."""
        return self.classifier.learner != "linear"

    @property
    def retrains(self) -> bool:
        """Whether stage 3 has a classifier of generated images."""
        return self.generates_images and self.diffusion.condition != "none"

    @property
    def teachers(self) -> list[str]:
        """The classifiers that a student can learn from."""
        found = ["probe", *((*self.ladder.rungs, "best") if self.ladder else ())]
        found += ["learner"] if self.trains_learner else []
        found += ["generated_features"] if self.generates_features else []
        found += ["retrained"] if self.retrains else []
        return [*found, "retrained_learner"] if self.retrains and self.trains_learner else found

    @property
    def teacher(self) -> str | None:
        """The classifier that the student learns from; None without a student."""
        if self.student is None:
            return None
        if self.student.teacher:
            return self.student.teacher
        if self.retrains:
            return "retrained_learner" if self.trains_learner else "retrained"
        return self.labels_from

    @property
    def features_per_class(self) -> int:
        """How many features of each class are generated, where any are."""
        return self.feature_diffusion.images_per_class or self.generate.images_per_class

    @property
    def further_seeds(self) -> tuple[int, ...]:
        """The seeds besides `generate.seed` that images are made with for the sweep."""
        first = self.generate.seed
        return tuple(range(first + 1, first + (self.sweep.seeds if self.sweep else 1)))

    @property
    def other_samples(self) -> tuple[OtherSampling, ...]:
        """The sets of generated images besides that of `generate` that the sweep tries, with each seed."""
        if self.sweep is None or not self.generates_images:
            return ()
        sets = list(self.sweep.generate)
        for seed in self.further_seeds:
            again = [other.model_copy(update={"seed": seed}) for other in self.sweep.generate]
            sets += [OtherSampling(seed=seed), *again]
        return tuple(sets)

    @property
    def retrain_grid(self) -> Sweep:
        """A sweep with stage 3's one configured setting."""
        r = self.retrain
        return Sweep(
            images_per_class=(r.images_per_class,),
            real_weight=(r.real_weight,),
            l2=(r.l2,),
            max_iterations=r.max_iterations,
            min_confidence=(r.min_confidence,),
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration in a YAML file, updated with `key.path=value` overrides.

    Raises ConfigError: one line naming the key, the value and what is allowed.
    """
    tree = merge(read_yaml(path), parse_overrides(overrides))
    if tree.pop("study", None) is not None:
        raise ConfigError(
            f"{path}: study: describes a study of several runs; make them with `dpt study {path}`"
        )
    return build(Config, tree, str(path))
