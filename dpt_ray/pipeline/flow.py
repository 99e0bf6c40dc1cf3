"""The flow of a run as nodes: which artifact is made from which settings and which other artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpt_ray.cluster.initial import weight_file
from dpt_ray.config import Config, ConfigError, to_yaml
from dpt_ray.config.sections import Section
from dpt_ray.engine.node import Node
from dpt_ray.evaluation.inception_files import WHERE, check_reference
from dpt_ray.models.precision import resolve_precisions
from dpt_ray.stages.index import fingerprint
from dpt_ray.store.artifact import sha256

# Settings that say how often to save or look, when to give up, or where a hashed file lies, but not what
# comes out.
_UNHASHED = {
    *("checkpoint_every", "log_every", "preview_every", "frechet_every", "sampling", "max_bad_fraction"),
    *("checkpoint_seconds", "diverged_above"),
    *("weights", "init_from", "file", "keep_in_train", "config"),
    *("inception", "reference", "images"),
}
# Options that count where they are used: leaving them out is what was done before there were any.
_OPTIONS = {"min_snr_gamma", "min_confidence", "alignment", "shuffle_shards", "heads", "blocks"}

Nodes = dict[str, Node]


def flow(config: Config) -> Nodes:
    """Every node of a run by name, inputs first."""
    asked, config = config, resolve_precisions(config)
    nodes: Nodes = {}
    _images_and_models(config, nodes)
    _first_stage(config, nodes)
    _second_stage(config, nodes)
    if config.diffusion.condition != "none":
        _third_stage(config, nodes)
    _measuring(config, nodes, to_yaml(asked))
    return nodes


def _add(
    nodes: Nodes,
    name: str,
    maker: str,
    settings: Section | Mapping[str, Any] | None = None,
    inputs: Mapping[str, Node] | None = None,
    *,
    file: tuple[str, str | None] = ("", None),
    stage: str = "",
    version: int = 1,
    extent: str = "",
    group: str = "",
    watched: Mapping[str, Node] | None = None,
) -> Node:
    """Adds a node; a `file` (the user's key, where it lies) counts by its content, not by its path."""
    values = settings.model_dump(mode="json") if isinstance(settings, Section) else dict(settings or {})
    left_out = _UNHASHED | {key for key in _OPTIONS if values.get(key) is None}
    hashed = {key: value for key, value in values.items() if key not in left_out}
    unhashed = {key: value for key, value in values.items() if key in left_out}
    key, source, unreadable = *file, ""
    if source:
        try:
            hashed["sha256"] = _content(key, source)
        except ConfigError as error:
            unreadable = str(error)
    nodes[name] = Node(
        name,
        stage or name,
        maker,
        version,
        hashed,
        inputs or {},
        extent,
        group,
        unhashed,
        watched or {},
        unreadable,
    )
    return nodes[name]


def _content(key: str, source: str) -> str:
    try:
        digest = sha256(weight_file(source))
        if key == "evaluate.reference":
            check_reference(source)
    except Exception as error:  # every kind of storage has errors of its own
        said = " ".join(str(error).split()) or type(error).__name__
        hint = f". {WHERE}" if key == "evaluate.inception" else ""
        raise ConfigError(f"{key}: {source}: {said.removeprefix(f'{source}: ')}{hint}") from error
    return digest


def _timm_weights(name: str) -> str:
    from dpt_ray.models.encoder import timm_weights

    try:
        return timm_weights(name)
    except ValueError as error:
        raise ConfigError(f"encoder.name: {error}") from error


def _images_and_models(config: Config, nodes: Nodes) -> None:
    source = config.data.model_dump(mode="json") | {"fingerprint": fingerprint(config.data)}
    if lists := config.data.keep_in_train:
        source["list_format"] = config.labels.format
        source["lists"] = [_content("data.keep_in_train", uri) for uri in lists]
    index = _add(nodes, "index", "index", source)
    _add(nodes, "labels", "labels", config.labels, {"index": index}, file=("labels.file", config.labels.file))
    channels, size = 1 if config.data.mode == "L" else 3, config.data.image_size
    if config.pretrain and config.encoder.kind == "pretrain":
        settings = _pretraining(config.pretrain, "simclr", size)
        _add(nodes, "encoder", "pretrain", settings, {"index": index})
    else:
        settings = config.encoder.model_dump(
            mode="json", include={"kind", "name", "weights", "heads", "blocks"}
        )
        if config.encoder.kind == "timm" and not config.encoder.weights:
            settings["weights"] = _timm_weights(str(config.encoder.name))
        _add(nodes, "encoder", "import_model", settings, file=("encoder.weights", settings["weights"]))
    settings = config.autoencoder.model_dump(mode="json", include={"kind", "weights"})
    settings |= {"channels": channels, "size": size}
    weights = config.autoencoder.weights
    _add(nodes, "autoencoder", "import_model", settings, file=("autoencoder.weights", weights))
    if weights := config.evaluate.inception:
        file = ("evaluate.inception", weights)
        _add(nodes, "inception", "import_model", {"inception": weights}, file=file)


def _first_stage(config: Config, nodes: Nodes) -> None:
    index, labels = nodes["index"], nodes["labels"]
    features = _features(config, nodes, "features", index, nodes["encoder"])
    settings = config.autoencoder.model_dump(mode="json", include={"flips", "precision"})
    settings["max_bad_fraction"] = config.data.max_bad_fraction
    inputs = {"images": index, "autoencoder": nodes["autoencoder"]}
    _add(nodes, "moments", "extract", settings, inputs, group="extract images")
    labelled = {"index": index, "features": features, "labels": labels}
    classifier = _add(nodes, "classifier", "fit_classifier", config.classifier, labelled)
    scored = {"index": index, "features": features, "classifier": classifier}
    labelled_images = _add(nodes, "pseudo_labels", "pseudo_label", inputs=scored)
    _add(nodes, "probe", "probe", inputs=scored | {"pseudo_labels": labelled_images})


def _second_stage(config: Config, nodes: Nodes) -> None:
    condition = config.diffusion.condition
    inputs = {
        "index": nodes["index"],
        "moments": nodes["moments"],
        "autoencoder": nodes["autoencoder"],
        "labels": nodes["pseudo_labels" if condition == "pseudo_labels" else "index"],
    }
    # How many images there are is the extent's to say: more of them must not be another artifact.
    settings = config.generate.model_dump(mode="json", exclude={"images_per_class"})
    settings["precision"] = config.generate.precision or config.autoencoder.precision
    if config.diffusion.weights:
        told = {"weights", "model", "schedule", "prediction", "condition"}
        published = config.diffusion.model_dump(mode="json", include=told)
        known = {key: inputs[key] for key in ("index", "autoencoder")}
        weights = ("diffusion.weights", config.diffusion.weights)
        denoiser = _add(nodes, "denoiser", "import_model", published, known, file=weights)
    else:
        training, watched = config.diffusion.model_dump(mode="json"), {}
        if config.diffusion.alignment:
            inputs["features"] = nodes["features"]
        if config.diffusion.preview_every or config.diffusion.frechet_every:
            training["sampling"] = settings
        if config.diffusion.frechet_every:
            watched = {key: nodes[key] for key in ("features", "encoder")}
        first = ("diffusion.init_from", config.diffusion.init_from)
        denoiser = _add(nodes, "denoiser", "train_diffusion", training, inputs, file=first, watched=watched)
    inputs = {"denoiser": denoiser, "autoencoder": nodes["autoencoder"]}
    # In version 1 the denoiser sampled in float32, whatever the precision; float32 samples are the same.
    version = 1 if settings["precision"] == "float32" else 2
    _add(nodes, "samples", "generate", settings, inputs, version=version, extent=_extent(config))


def _third_stage(config: Config, nodes: Nodes) -> None:
    encoder = nodes["encoder"]
    labelled = {key: nodes[key] for key in ("index", "features", "labels")}
    sources = {"generated": _features(config, nodes, "sample_features", nodes["samples"], encoder)}
    _add(nodes, "retrained", "fit_classifier", config.retrain, labelled | sources, stage="classifier")
    if config.evaluate.controls:
        settings = {
            "strength": config.evaluate.augment_strength,
            "image_size": config.data.image_size,
            "indices_per_shard": config.generate.indices_per_shard,
            "seed": config.generate.seed,
        }
        inputs = {"index": nodes["index"], "labels": nodes["labels"]}
        augmented = _add(nodes, "augmented", "augment", settings, inputs, extent=_extent(config))
        sources["augmented"] = _features(config, nodes, "augmented_features", augmented, encoder)
        sources["self_training"] = nodes["pseudo_labels"]
    # Without either there is nothing to choose, and no validation image is needed.
    if config.sweep or config.evaluate.controls:
        grid = (config.sweep or config.retrain_grid).model_dump(mode="json")
        if config.evaluate.controls:
            # lambda = l2 / n, and stage 3 has hundreds of times the probe's n: room to choose as little.
            grid["probe_l2"] = [config.classifier.l2 / 10**decade for decade in range(4)]
        _add(nodes, "sweep", "sweep", grid, labelled | sources)


def _measuring(config: Config, nodes: Nodes, text: str) -> None:
    if config.evaluate.referee:
        settings = _pretraining(config.evaluate.referee, "supervised", config.data.image_size)
        inputs = {"index": nodes["index"]}
        referee = _add(nodes, "referee", "pretrain", settings, inputs, stage="encoder")
        _features(config, nodes, "referee_features", nodes["index"], referee)
        _features(config, nodes, "referee_sample_features", nodes["samples"], referee)
    if config.evaluate.inception:
        _inception(config, nodes)
    measured = [
        *("index", "features", "classifier", "probe", "retrained", "sweep"),
        *("sample_features", "referee_features", "referee_sample_features", "image_metrics"),
    ]
    inputs = {key: nodes[key] for key in measured if key in nodes}
    # The features' identities hold their encoders'; what these say of themselves is shown.
    watched = {key: node for key, node in nodes.items() if key in ("encoder", "referee")}
    _add(nodes, "evaluation", "evaluate", inputs=inputs, version=4, watched=watched)
    _add(
        nodes,
        "report",
        "report",
        {"title": config.name, "config": text},
        {key: node for key, node in nodes.items() if key != "report"},
    )


def _inception(config: Config, nodes: Nodes) -> None:
    """What Inception says of generated and test images, and the metrics that follow from it."""
    asked, samples = config.evaluate, nodes["samples"]
    settings = {"resize": asked.resize, "image_size": config.data.image_size}
    # As with images per class: fewer of the same images are another extent.
    most = {"images": asked.images} if asked.images else {}
    extent = samples.extent + (f"-n{asked.images}" if asked.images else "")
    for name, images in (("samples", samples), ("reference", nodes["index"])):
        _add(
            nodes,
            f"inception_{name}",
            "inception",
            settings | (most if name == "samples" else {}),
            {"inception": nodes["inception"], "images": images},
            stage="inception_statistics",
            extent=extent if name == "samples" else "",
            group="measure images",
            watched={"index": nodes["index"]},
        )
    inputs = {
        "inception": nodes["inception"],  # first: a file that cannot serve is told before any training
        "generated": nodes["inception_samples"],
        "real": nodes["inception_reference"],
    }
    file = ("evaluate.reference", asked.reference)
    _add(nodes, "image_metrics", "image_metrics", {"reference": asked.reference}, inputs, file=file)


def _pretraining(section: Section, objective: str, size: int) -> dict[str, Any]:
    return section.model_dump(mode="json") | {"objective": objective, "image_size": size}


def _features(config: Config, nodes: Nodes, name: str, images: Node, encoder: Node) -> Node:
    """The features of some images; all that one run wants of the same images is one pass."""
    return _add(
        nodes,
        name,
        "extract",
        {"precision": config.encoder.precision, "max_bad_fraction": config.data.max_bad_fraction},
        {"images": images, "encoder": encoder},
        stage="features",
        extent=images.extent,
        group=f"extract {images.name if images.extent else 'images'}",
    )


def _extent(config: Config) -> str:
    return f"k{config.generate.images_per_class}"
