"""The configuration of a study: runs over label draws, labels per class, encoder seeds and variants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dpt_ray.config.run import Config
from dpt_ray.config.sections import Count, Encoder, Section, Seed
from dpt_ray.config.values import Counts, Distinct
from dpt_ray.config.yaml_file import ConfigError, build, merge, parse_overrides, read_yaml

VariantName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class Study(Section):
    """Runs for every number of labels x encoder seed x label draw, with variants and references.

    Label draws are nested in encoder seeds: no two seeds share a draw. `variants` are changes of sections
    by name; each is run for every run of the base, with the same encoder, labels and noise. A variant that
    is null, as by an override, is left out. `references` are runs whose denoiser is trained without labels
    ("none") or with all true labels, one per encoder seed.
    """

    labels_per_class: Counts
    encoder_seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1), Distinct]
    draws: Count
    variants: dict[VariantName, dict[str, Any]] = Field(default_factory=dict)
    references: Annotated[tuple[Literal["none", "true_labels"], ...], Field(strict=False)] = ()
    concurrent_runs: Count = 1

    @field_validator("variants", mode="before")
    @classmethod
    def _left_out(cls, variants: Any) -> Any:
        if not isinstance(variants, dict):
            return variants
        return {name: changes for name, changes in variants.items() if changes is not None}

    @model_validator(mode="after")
    def _sections(self) -> Study:
        varied = {key for changes in self.variants.values() for key in changes}
        if fixed := varied & {"name", "output"}:
            raise ValueError(
                f"variants change {', '.join(sorted(fixed))}, which the study gives its runs; remove it"
            )
        if unknown := varied - Config.model_fields.keys():
            raise ValueError(
                f"variants change {', '.join(sorted(unknown))}, which is not a section of a run; remove it"
            )
        return self


def run_name(study: str, per_class: int, seed: int, draw: int, variant: str = "") -> str:
    """Return the name of a run of a study; the base has no variant."""
    return f"{study}{variant and '-' + variant}-n{per_class}-e{seed}-d{draw}"


def reference_name(study: str, condition: str, seed: int) -> str:
    """Return the name of a reference run of a study."""
    return f"{study}-{condition.replace('_', '-')}-e{seed}"


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Study, dict[str, Config]]:
    """Return the study in a YAML file (a run's sections and `study`) and its runs by name.

    Raises ConfigError as `load_config` does, and for a base whose labels or encoder a study cannot repeat.
    """
    tree = merge(read_yaml(path), parse_overrides(overrides))
    study = build(Study, tree.pop("study", None) or {}, f"{path}: study")
    _check_repeatable(tree, study, path)
    name = "study" if tree.get("name") is None else tree["name"]
    if study.references and tree.get("generate_in") == "features":
        raise ConfigError(
            f"{path}: study.references: {list(study.references)} are denoisers of images, and generate_in is "
            "features: set generate_in=images or both, or study.references=[]"
        )
    runs = {}
    for per_class, draw, seed in product(study.labels_per_class, range(study.draws), study.encoder_seeds):
        for variant, changes in {"": {}, **study.variants}.items():
            key = run_name(name, per_class, seed, draw, variant)
            run = merge(_repeat(tree, key, per_class, seed, draw), changes)
            runs[key] = _seeded(run, seed, draw)
    for condition, seed in product(study.references, study.encoder_seeds):
        key = reference_name(name, condition, seed)
        repeat = _repeat(tree, key, study.labels_per_class[0], seed, 0)
        runs[key] = _seeded(merge(repeat, {"diffusion": {"condition": condition}}), seed, 0)
    return study, {key: build(Config, run, f"{path}: {key}") for key, run in runs.items()}


def _value(tree: dict[str, Any], section: str, key: str) -> Any:
    """Return an unvalidated value, None where it is missing."""
    values = tree.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _pretrains(tree: dict[str, Any]) -> bool:
    return (_value(tree, "encoder", "kind") or Encoder().kind) == "pretrain"


def _check_repeatable(tree: dict[str, Any], study: Study, path: str | Path) -> None:
    if file := _value(tree, "labels", "file"):
        raise ConfigError(
            f"{path}: labels.file: {file!r}: a study draws its labels (study.labels_per_class, study.draws); "
            "leave the list out (labels.file=null)"
        )
    if not _pretrains(tree) and len(study.encoder_seeds) > 1:
        raise ConfigError(
            f"{path}: study.encoder_seeds: {list(study.encoder_seeds)}: encoder.kind "
            f"{_value(tree, 'encoder', 'kind')} is one encoder, which no seed changes; give one seed and "
            "more study.draws"
        )


def _repeat(tree: dict[str, Any], name: str, per_class: int, seed: int, draw: int) -> dict[str, Any]:
    """Return a run of a study; denoiser and noise seeds follow the draw, so draws repeat all of it."""
    draw_seed = 1000 * seed + draw
    changes: dict[str, Any] = {
        "name": name,
        "labels": {"per_class": per_class, "seed": draw_seed},
        "diffusion": {"seed": draw_seed},
        "generate": {"seed": draw_seed},
    }
    if _pretrains(tree):
        changes["pretrain"] = {"seed": seed}
    return merge(tree, changes)


def _seeded(run: dict[str, Any], seed: int, draw: int) -> dict[str, Any]:
    """Return a run whose further trainings (features, learner, student) have a seed of its draw."""
    found = [section for section in ("semi_supervised", "student") if run.get(section) is not None]
    if run.get("generate_in", "images") != "images":
        found.append("feature_diffusion")
    return merge(run, {section: {"seed": 1000 * seed + draw} for section in found})
