"""One YAML file describes a run: typed, frozen, checked as a whole before anything starts.

Sections mirror the stages. `compute` says how to run and never changes a result, so it is never part
of an artifact's identity. `guidance` is the diffusers convention w (1 = none; the paper's s = 0.4 is
w = 1.4).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Counts = Annotated[tuple[Count, ...], Field(strict=False, min_length=1)]
T = TypeVar("T", bound=BaseModel)
RealWeight = Annotated[float, Field(gt=0)] | Literal["balanced"]


class ConfigError(ValueError):
    """A configuration or an input that cannot be run: one line with the key, the value, the remedy."""


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys and wrong types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Data(Section):
    """Where the images are. `validation` and `test` are drawn where the source has no such split."""

    source: Literal["digits", "folder", "tar", "parquet", "manifest"]
    uri: str | None = None
    mode: Literal["L", "RGB"] = "RGB"
    image_size: Count = 256
    validation: Annotated[int, Field(ge=0)] = 0
    test: Annotated[int, Field(ge=0)] = 0
    split_seed: Seed = 0
    max_bad_fraction: Fraction = 0.001

    @model_validator(mode="after")
    def _uri(self) -> Data:
        if self.source == "digits" and (self.uri or self.validation or self.test):
            raise ValueError("digits comes with scikit-learn: leave out uri, validation and test")
        if self.source != "digits" and not self.uri:
            raise ValueError(f"source {self.source} needs uri: the folder or file of the images")
        return self


class Labels(Section):
    """The few labels: drawn (`per_class` of the known ones, by `seed`) or listed in a `file`."""

    per_class: Count | None = None
    seed: Seed = 0
    file: str | None = None
    format: Literal["csv", "published"] = "csv"

    @model_validator(mode="after")
    def _one_source(self) -> Labels:
        if (self.per_class is None) == (self.file is None):
            raise ValueError("give either per_class (draw) or file (a label list)")
        return self


class Optimisation(Section):
    """AdamW with warm-up, shared by every training stage. `batch_size` is the global batch."""

    steps: Count
    batch_size: Annotated[int, Field(ge=8, multiple_of=8)]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 0.03
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.99)
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    ema_decay: Fraction = 0.999
    grad_clip: Positive | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: Count = 200
    log_every: Count = 20
    seed: Seed = 0


class Pretrain(Optimisation):
    """Self-supervised encoder on the run's own images (SimCLR), for those who bring none."""

    width: Count = 32
    dim: Count = 128
    temperature: Positive = 0.2
    contrast_group: Count = 128
    augment_strength: Positive = 1.0

    @model_validator(mode="after")
    def _groups(self) -> Pretrain:
        if self.batch_size % self.contrast_group or self.contrast_group % 8:
            raise ValueError(
                f"contrast_group {self.contrast_group} must divide batch_size {self.batch_size} "
                "and be a multiple of 8"
            )
        return self


class Encoder(Section):
    """The frozen encoder: trained here (`pretrain`) or loaded from published weights."""

    kind: Literal["pretrain", "msn", "timm"] = "pretrain"
    name: str | None = None
    weights: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"


class Autoencoder(Section):
    """Images to moments and latents back to images; `identity` trains on the pixels themselves."""

    kind: Literal["identity", "kl"] = "identity"
    weights: str | None = None
    flips: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"


class Classifier(Section):
    """Multinomial logistic regression on row-normalised features: l2 = 0.0025 / n in the paper."""

    l2: Positive = 0.0025
    max_iterations: Count | None = None


class Denoiser(Section):
    """The U-ViT. `modulation` (adaLN) off is the published network."""

    patch_size: Count = 2
    dim: Count
    depth: Annotated[int, Field(ge=2, multiple_of=2)]
    heads: Count
    final_conv: bool = True
    modulation: bool = False

    @model_validator(mode="after")
    def _heads(self) -> Denoiser:
        if self.dim % self.heads:
            raise ValueError(f"heads {self.heads} must divide dim {self.dim}")
        return self


class Diffusion(Optimisation):
    """Stage 2: what the denoiser is, and how it is trained."""

    model: Denoiser
    schedule: Literal["vp", "stable_diffusion", "cosine", "linear"] = "vp"
    prediction: Literal["noise", "v", "flow"] = "noise"
    label_dropout: Fraction = 0.15
    condition: Literal["pseudo_labels", "true_labels", "none"] = "pseudo_labels"


class Generate(Section):
    """Class-conditional sampling. `images_per_class` may grow later without making any image again."""

    images_per_class: Count
    guidance: Positive = 1.0
    guidance_interval: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    solver: Literal["dpm_solver_fast", "dpm_solver_pp_fast", "dpm_solver_pp_2m"] = "dpm_solver_pp_2m"
    nfe: Count = 25
    indices_per_shard: Count = 16
    seed: Seed = 0


class Retrain(Section):
    """Stage 3: real labelled rows (weight `real_weight`) with generated rows (weight 1)."""

    images_per_class: Count
    real_weight: RealWeight = 1.0
    l2: Positive = 0.0025
    max_iterations: Count | None = None


class Sweep(Section):
    """The grid of stage 3 (and of its controls), chosen on validation."""

    images_per_class: Counts
    real_weight: Annotated[tuple[RealWeight, ...], Field(strict=False, min_length=1)] = (1.0,)
    l2: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (0.0025,)


class Evaluate(Section):
    """What is measured. `referee` is an independent classifier, trained only to measure."""

    controls: bool = True
    augment_strength: Positive = 1.0
    referee: Pretrain | None = None


class Compute(Section):
    """How to run: recorded, never part of an identity.

    `train_workers: 0` trains in the driver's process, without Ray Train's worker processes (their
    start-up costs more than a small training). `threads` are per worker and actor.
    """

    cpus: Count | None = None
    threads: Count = 1
    train_workers: Annotated[int, Field(ge=0)] = 1
    actors: Count = 1
    actor_cpus: Positive = 0.5
    actor_gpus: Annotated[float, Field(ge=0)] = 0.0
    train_gpus: bool = False
    batch_size: Count = 256
    max_failures: Annotated[int, Field(ge=0)] = 2
    concurrent_trials: Count = 2
    autoscaling: bool = False


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    output: str = "outputs"
    data: Data
    labels: Labels
    encoder: Encoder = Encoder()
    pretrain: Pretrain | None = None
    autoencoder: Autoencoder = Autoencoder()
    classifier: Classifier = Classifier()
    diffusion: Diffusion
    generate: Generate
    retrain: Retrain
    sweep: Sweep | None = None
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _across_sections(self) -> Config:
        if self.encoder.kind == "pretrain" and self.pretrain is None:
            raise ValueError("encoder.kind pretrain needs a pretrain section")
        asked = max([self.retrain.images_per_class, *(self.sweep or self.retrain_grid).images_per_class])
        if asked > self.generate.images_per_class:
            raise ValueError(
                f"retrain and sweep ask for {asked} images per class, but generate.images_per_class "
                f"is {self.generate.images_per_class}: raise it or ask for fewer"
            )
        for section in (self.pretrain, self.diffusion, self.evaluate.referee):
            if section and section.batch_size % (8 * max(1, self.compute.train_workers)):
                raise ValueError(
                    f"batch_size {section.batch_size} must be a multiple of 8 x "
                    f"compute.train_workers ({self.compute.train_workers})"
                )
        return self

    @property
    def retrain_grid(self) -> Sweep:
        """The sweep that holds stage 3's one fixed setting."""
        r = self.retrain
        return Sweep(images_per_class=(r.images_per_class,), real_weight=(r.real_weight,), l2=(r.l2,))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2e-4 as text; this loader reads it as the number it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, laid over the file its `base` key names (relative to it), if any."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections")
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    return merge(read_yaml(path.parent / str(base)), tree)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings are merged key by key, null removes."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1"]` as `{"a": {"b": 1}}`; values are YAML."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"override {override!r}: write key.path=value")
        node: Any = yaml.load(value, Loader=_Loader) if value else None
        for part in reversed(key.split(".")):
            node = {part: node}
        tree = merge(tree, node)
    return tree


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration in a YAML file with `key.path=value` overrides on top.

    Raises ConfigError: one line naming the key, the value and what is allowed.
    """
    return build(Config, merge(read_yaml(path), parse_overrides(overrides)), str(path))


def build(model: type[T], tree: dict[str, Any], source: str) -> T:
    """`model` from plain data; the first problem becomes a one-line ConfigError."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _keys(model, path[:-1]), n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else "remove it"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: missing; add it"
        case "value_error":
            return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {first['input']!r}: {message}"


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys allowed at `path` below `model`."""
    for part in path:
        field = model.model_fields.get(part)
        options = (field.annotation, *get_args(field.annotation)) if field else ()
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML: itself a valid input."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
