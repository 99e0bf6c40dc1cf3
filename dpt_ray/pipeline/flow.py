"""The flow of a run as nodes: each artifact with its settings and the artifacts it is made from."""

from __future__ import annotations

from collections.abc import Mapping

from dpt_ray.config import Config, to_yaml
from dpt_ray.config.features import FeatureSampling, FeatureTraining
from dpt_ray.config.hashing import Settings
from dpt_ray.config.ladder import RUNGS, Ladder
from dpt_ray.config.sections import SampleSettings
from dpt_ray.config.semi_supervised import LearnerSettings, SemiSupervised
from dpt_ray.config.sweep import set_name
from dpt_ray.config.training import Pretrain
from dpt_ray.engine.node import AnyStage, Extent, Node, NoSettings
from dpt_ray.models.precision import resolve_precisions, resolved
from dpt_ray.pipeline.encoders import check_network, encoder_settings
from dpt_ray.pipeline.stage_settings import (
    augment_settings,
    autoencoder_settings,
    content,
    index_settings,
    moment_settings,
    sample_settings,
    student_settings,
    sweep_settings,
)
from dpt_ray.stages.augmented import Augmented
from dpt_ray.stages.autoencoder import ImportedAutoencoder
from dpt_ray.stages.best_rung import BestRung, BestRungSettings
from dpt_ray.stages.classifier import Classifier, Retrained
from dpt_ray.stages.denoiser import Denoiser, DenoiserSettings
from dpt_ray.stages.encoder import PretrainedEncoder, PretrainSettings
from dpt_ray.stages.evaluation import Evaluation, EvaluationSettings
from dpt_ray.stages.extract import Features, FeatureSettings, Moments
from dpt_ray.stages.feature_denoiser import FeatureDenoiser
from dpt_ray.stages.feature_samples import FeatureSamples
from dpt_ray.stages.generated_features import FeatureRetrainSettings, GeneratedFeatures
from dpt_ray.stages.given_pseudo_labels import GivenPseudoLabels, GivenPseudoLabelsSettings
from dpt_ray.stages.graph import Graph, GraphSettings
from dpt_ray.stages.image_metrics import ImageMetrics, MetricSettings
from dpt_ray.stages.imported_denoiser import ImportedDenoiser, ImportedDenoiserSettings
from dpt_ray.stages.imported_encoder import ImportedEncoder
from dpt_ray.stages.inception import Inception, InceptionSettings
from dpt_ray.stages.inception_statistics import InceptionStatistics, StatisticsSettings
from dpt_ray.stages.index import Index
from dpt_ray.stages.labels import Labels
from dpt_ray.stages.ladder import LadderResults
from dpt_ray.stages.learner import Learner, LearnerClassifier
from dpt_ray.stages.probe import Probe
from dpt_ray.stages.pseudo_labels import PseudoLabels
from dpt_ray.stages.report import Report, ReportSettings
from dpt_ray.stages.rung import LadderRung, RungSettings
from dpt_ray.stages.samples import Samples
from dpt_ray.stages.student import Student
from dpt_ray.stages.sweep import Sweep as SweepStage

Nodes = dict[str, Node]


def flow(config: Config) -> Nodes:
    """Return every node of a run by name, inputs first."""
    run = _Run(resolve_precisions(config), to_yaml(config))
    run.images_and_models()
    run.first_stage()
    if config.trains_learner:
        run.learner()
    if config.ladder:
        run.ladder(config.ladder)
    if config.generates_features:
        run.pilot()
    if config.generates_images:
        run.second_stage()
    if not config.generates_images or config.diffusion.condition != "none":
        run.third_stage()
    if config.student:
        run.student()
    run.measuring()
    return run.nodes


class _Run:
    """Builds the nodes of a run, part by part in the order of the paper."""

    def __init__(self, config: Config, text: str) -> None:
        """`text` is the configuration before precisions are resolved, for the report."""
        self.config, self.text = config, text
        self.nodes: Nodes = {}
        self.extent = Extent(images_per_class=config.generate.images_per_class)

    def add(
        self,
        name: str,
        stage: AnyStage,
        inputs: Mapping[str, Node | None],
        settings: Settings | None = None,
        *,
        extent: Extent | None = None,
        group: str = "",
    ) -> Node:
        """Add a node; inputs that are None are left out."""
        given = {key: node for key, node in inputs.items() if node}
        chosen = settings or NoSettings()
        self.nodes[name] = Node.of(name, stage, chosen, given, content, extent=extent, group=group)
        return self.nodes[name]

    def images_and_models(self) -> None:
        """Add index, labels, and the networks that are frozen or trained without labels."""
        config = self.config
        index = self.add("index", Index, {}, index_settings(config))
        self.add("labels", Labels, {"index": index}, config.labels)
        if file := config.pseudo_labels_file:
            given = GivenPseudoLabelsSettings(file=file)
            self.add("given_labels", GivenPseudoLabels, {"index": index}, given)
        # What is read from files comes before any training: a file that cannot serve is told first.
        if config.generates_images:
            self.add("autoencoder", ImportedAutoencoder, {}, autoencoder_settings(config))
            if config.evaluate.inception:
                self.add("inception", Inception, {}, InceptionSettings(inception=config.evaluate.inception))
        if config.encoder.kind == "pretrain":
            assert config.pretrain is not None  # checked by Config
            self.pretrain("encoder", config.pretrain, config.pretrain.objective)
        else:
            self.add("encoder", ImportedEncoder, {}, encoder_settings(config))

    def first_stage(self) -> None:
        """Add stage 1: features, the classifier of the few labels, and a pseudo-label for every image."""
        config, nodes = self.config, self.nodes
        index, labels = nodes["index"], nodes["labels"]
        features = self.features("features", index, nodes["encoder"])
        if config.generates_images:
            sources = {"images": index, "autoencoder": nodes["autoencoder"]}
            self.add("moments", Moments, sources, moment_settings(config), group="extract images")
        labelled = {"index": index, "features": features, "labels": labels}
        classifier = self.add("classifier", Classifier, labelled, config.classifier)
        scored = {"index": index, "features": features, "classifier": classifier}
        pseudo_labels = self.add("pseudo_labels", PseudoLabels, scored)
        self.add("probe", Probe, {**scored, "labels": labels, "pseudo_labels": pseudo_labels})

    def learner(self) -> None:
        """Add stage 1's learner that trains the encoder, and its pseudo-labels."""
        classifier = self.train_learner("learner")
        scored = {"index": self.nodes["index"], "features": self.nodes["learner_features"]}
        self.add("learner_labels", PseudoLabels, {**scored, "classifier": classifier})

    def train_learner(self, name: str, samples: Node | None = None) -> Node:
        """Add a learner, its features of all images, and its classifier, which is returned."""
        section, method, nodes = self.config.semi_supervised, self.config.classifier.learner, self.nodes
        assert section is not None and method != "linear"  # checked by Config
        settings = LearnerSettings(
            **section.model_dump(include=set(SemiSupervised.model_fields)),
            method=method,
            images_per_class=self.config.retrain.images_per_class if samples else None,
            max_bad_fraction=self.config.data.max_bad_fraction,
        )
        from_probe = section.head == "probe"
        sources = {
            **{key: nodes[key] for key in ("index", "labels", "encoder")},
            **{key: nodes[key] if from_probe else None for key in ("classifier", "pseudo_labels")},
            "samples": samples,
        }
        return self.trained(self.add(name, Learner, sources, settings))

    def trained(self, encoder: Node) -> Node:
        """Add the features of an encoder that was trained with a classifier, which is returned."""
        index, name = self.nodes["index"], encoder.name
        features = self.features(f"{name}_features", index, encoder, together=False)
        given = {"index": index, "features": features, "learner": encoder}
        return self.add(f"{name}_classifier", LearnerClassifier, given)

    def ladder(self, ladder: Ladder) -> None:
        """Add the rungs of stage 1 besides the probe, the best of all, and their measurement."""
        nodes, probe_l2 = self.nodes, self.config.classifier.l2
        labelled = {key: nodes[key] for key in ("index", "features", "labels")}
        graph: Node | None = None
        rungs: Nodes = {}
        if "propagation" in ladder.rungs:
            sources = {key: labelled[key] for key in ("index", "features")}
            graph = self.add("graph", Graph, sources, GraphSettings(neighbours=ladder.neighbours))
        for name in (rung for rung in RUNGS if rung in ladder.rungs):
            balanced = name not in ("tuned_probe", "self_training")
            settings = RungSettings(
                method=name,
                probe_l2=probe_l2,
                prior=ladder.prior if balanced else "uniform",
                choose_on=ladder.choose_on,
            )
            given = {**labelled, "graph": graph if name == "propagation" else None}
            rungs[name] = self.add(name, LadderRung, given, settings)
        stage_1 = {key: nodes[key] for key in ("classifier", "pseudo_labels")}
        if "best" in (self.config.labels_from, self.config.teacher):
            self.add("best", BestRung, {**stage_1, **rungs}, BestRungSettings(choose_on=ladder.choose_on))
        sources = {key: nodes[key] for key in ("index", "features", "labels", "probe")}
        self.add("ladder", LadderResults, {**sources, **stage_1, **rungs, "graph": graph})

    @property
    def pseudo_labels(self) -> Node:
        """The node of the pseudo-labels that stage 2 trains on."""
        name = self.config.labels_from
        own = {"probe": "pseudo_labels", "learner": "learner_labels", "file": "given_labels"}
        return self.nodes[own.get(name, name)]

    def pilot(self) -> None:
        """Add stages 2 and 3 on features, and what they bring beside stage 1."""
        config, nodes = self.config, self.nodes
        feature = config.feature_diffusion
        training = FeatureTraining(**feature.model_dump(include=set(FeatureTraining.model_fields)))
        labels = {"pseudo_labels": self.pseudo_labels}
        rows = {key: nodes[key] for key in ("index", "features")}
        denoiser = self.add("feature_denoiser", FeatureDenoiser, {**rows, **labels}, training)
        count = config.features_per_class
        samples = self.add(
            "feature_samples",
            FeatureSamples,
            {"feature_denoiser": denoiser},
            FeatureSampling(**feature.model_dump(include=set(FeatureSampling.model_fields))),
            extent=Extent(images_per_class=count),
        )
        settings = FeatureRetrainSettings(
            images_per_class=count,
            real_weight=config.retrain.real_weight,
            choose_on=config.ladder.choose_on if config.ladder else "validation",
        )
        given = {**rows, "labels": nodes["labels"], "feature_samples": samples}
        self.add("generated_features", GeneratedFeatures, given, settings)
        self.add("pilot", LadderResults, {key: nodes.get(key) for key in LadderResults.inputs})

    def second_stage(self) -> None:
        """Add stage 2: the denoiser, and generated images for each class."""
        config, nodes = self.config, self.nodes
        sampling = sample_settings(config)
        if config.diffusion.weights:
            settings = config.diffusion.model_dump(include=set(ImportedDenoiserSettings.model_fields))
            sources = {key: nodes[key] for key in ImportedDenoiser.inputs}
            denoiser = self.add("denoiser", ImportedDenoiser, sources, ImportedDenoiserSettings(**settings))
        else:
            denoiser = self.train_denoiser(sampling)
        sources = {"denoiser": denoiser, "autoencoder": nodes["autoencoder"]}
        if config.generate.resample:
            sources |= {"encoder": nodes["encoder"], **self.judge()}
        self.add("samples", Samples, sources, sampling, extent=self.extent)
        for other in config.other_samples:
            changed = SampleSettings.model_validate(sampling.model_dump() | other.changes)
            self.add(f"samples:{other.name}", Samples, sources, changed, extent=self.extent)

    def train_denoiser(self, sampling: SampleSettings) -> Node:
        """Add the training of the denoiser, with its previews and Frechet distances."""
        config, nodes = self.config, self.nodes
        diffusion = config.diffusion
        # A preview shows what the denoiser makes, not what of it passes.
        sampling = sampling.model_copy(update={"resample": None, "features_precision": None})
        samples_while_training = diffusion.preview_every or diffusion.frechet_every
        settings = DenoiserSettings(
            **diffusion.model_dump(),
            sampling=sampling if samples_while_training else None,
            features_precision=resolved(config.encoder.precision) if diffusion.frechet_every else None,
        )
        from_pseudo_labels = diffusion.condition == "pseudo_labels"
        sources = {
            **{key: nodes[key] for key in ("index", "moments", "autoencoder")},
            "pseudo_labels": self.pseudo_labels if from_pseudo_labels else None,
            "true_labels": None if from_pseudo_labels else nodes["index"],
            "features": nodes["features"] if diffusion.alignment else None,
            "watched_features": nodes["features"] if diffusion.frechet_every else None,
            "encoder": nodes["encoder"] if diffusion.frechet_every else None,
        }
        return self.add("denoiser", Denoiser, sources, settings)

    def third_stage(self) -> None:
        """Add stage 3: the classifier retrained with generated images, if there are any, and its controls."""
        config, nodes = self.config, self.nodes
        rows = {key: nodes[key] for key in ("index", "features", "labels")}
        if config.generates_images:
            samples = rows["samples"] = nodes["samples"]
            rows["sample_features"] = self.features("sample_features", samples, nodes["encoder"])
            judge = self.judge() if config.retrain.min_confidence is not None else {}
            self.add("retrained", Retrained, rows | judge, config.retrain)
            if config.trains_learner:
                self.train_learner("retrained_learner", samples)
        controls = self.controls() if config.evaluate.controls else {}
        if settings := sweep_settings(config):
            judge = self.judge() if settings.filters and config.generates_images else {}
            self.add("sweep", SweepStage, {**rows, **controls, **judge, **self.other_samples()}, settings)

    def other_samples(self) -> dict[str, Node]:
        """Return the sets of images that the sweep tries besides, and add their features."""
        found: dict[str, Node] = {}
        for other in self.config.other_samples:
            samples, name = self.nodes[f"samples:{other.name}"], f"sample_features:{other.name}"
            found[samples.name] = samples
            found[name] = self.features(name, samples, self.nodes["encoder"])
        return found

    def judge(self) -> dict[str, Node]:
        """Return the classifier that decides which generated images are used: that of the pseudo-labels.

        It is the probe where that one is a learner, with features of its own, or a table.
        """
        rung = self.pseudo_labels
        if rung.artifact_name == "rung":
            return {"judge": rung, "judge_labels": rung}
        return {"judge": self.nodes["classifier"], "judge_labels": self.nodes["pseudo_labels"]}

    def controls(self) -> dict[str, Node]:
        """Add augmented views of the labelled images; return the inputs of the sweep's controls."""
        config, nodes = self.config, self.nodes
        sources = {"index": nodes["index"], "labels": nodes["labels"]}
        found = {"pseudo_labels": self.pseudo_labels}
        for seed in (None, *config.further_seeds):
            which = "" if seed is None else f":{set_name('', seed)}"
            settings, name = augment_settings(config, seed), f"augmented{which}"
            found[name] = self.add(name, Augmented, sources, settings, extent=self.extent)
            features = f"augmented_features{which}"
            found[features] = self.features(features, found[name], nodes["encoder"])
        return found

    def student(self) -> None:
        """Add the student of a classifier of the run, its features and its classifier."""
        nodes, settings = self.nodes, student_settings(self.config)
        teacher = settings.teacher
        own = teacher in ("learner", "retrained_learner")  # features of its own
        classifier = f"{teacher}_classifier" if own else {"probe": "classifier"}.get(teacher, teacher)
        sources = {
            "index": nodes["index"],
            "features": nodes[f"{teacher}_features" if own else "features"],
            "teacher": nodes[classifier],
        }
        self.trained(self.add("student", Student, sources, settings))

    def measuring(self) -> None:
        """Add the measurements on test images: distances, accuracies, and the report."""
        config, nodes = self.config, self.nodes
        if config.evaluate.referee and config.generates_images:
            referee = self.pretrain("referee", config.evaluate.referee, "supervised")
            self.features("referee_features", nodes["index"], referee)
            self.features("referee_sample_features", nodes["samples"], referee)
        if config.evaluate.inception and config.generates_images:
            self.inception_metrics()
        # The pilot has all that the ladder has.
        found = nodes | {"ladder": nodes["pilot"]} if "pilot" in nodes else nodes
        measured = {key: found.get(key) for key in Evaluation.inputs}
        measured |= {key: node for key, node in nodes.items() if key.startswith("samples:")}
        retrain = config.retrain if "retrained" in nodes else None
        self.add("evaluation", Evaluation, measured, EvaluationSettings(retrain=retrain))
        settings = ReportSettings(title=config.name, config=self.text, labels_from=config.labels_from)
        shown = {key: node for key, node in nodes.items() if key.partition(":")[0] in Report.inputs}
        self.add("report", Report, shown, settings)

    def inception_metrics(self) -> None:
        """Add the Inception statistics of generated and test images, and the metrics from them."""
        asked, nodes, inception = self.config.evaluate, self.nodes, self.nodes["inception"]
        size = self.config.data.image_size
        # As with images per class, fewer of the same images are another extent.
        some = Extent(self.extent.images_per_class, asked.images)
        uniform = asked.labels == "uniform"
        label_seed = self.config.generate.seed if uniform else None
        found = {
            name: self.add(
                name,
                InceptionStatistics,
                {"inception": inception, "images": nodes[source], "index": nodes["index"]},
                StatisticsSettings(resize=asked.resize, image_size=size, images=images, label_seed=seed),
                extent=extent,
                group="measure images",
            )
            for name, source, images, extent, seed in (
                ("inception_samples", "samples", asked.images, some, label_seed),
                ("inception_reference", "index", None, None, None),
            )
        }
        # Inception is an input of its own, so that a bad file is reported before any training.
        metrics = MetricSettings(reference=asked.reference, resize=asked.resize, labels=asked.labels)
        self.add("image_metrics", ImageMetrics, {"inception": inception, **found}, metrics)

    def pretrain(self, name: str, section: Pretrain, objective: str) -> Node:
        """Add the training of an encoder on the run's own images."""
        size = self.config.data.image_size
        if section.patch_size:
            check_network(f"{'pretrain' if name == 'encoder' else 'evaluate.referee'}.network", section, size)
        settings = PretrainSettings(
            **section.model_dump(include=set(Pretrain.model_fields)), objective=objective, image_size=size
        )
        return self.add(name, PretrainedEncoder, {"index": self.nodes["index"]}, settings)

    def features(self, name: str, images: Node, encoder: Node, *, together: bool = True) -> Node:
        """Add the features of `images`; what is made of the same images shares one pass if `together`."""
        settings = FeatureSettings(
            precision=resolved(self.config.encoder.precision),
            max_bad_fraction=self.config.data.max_bad_fraction,
        )
        group = f"extract {images.name if images.extent != Extent() else 'images'}"
        sources = {"images": images, "encoder": encoder}
        return self.add(
            name, Features, sources, settings, extent=images.extent, group=group if together else ""
        )
