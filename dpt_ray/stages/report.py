"""report: one HTML page with the stages and their cost, the results and example images."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated

from dpt_ray.config.hashing import HashedIfSet, NotHashed, Settings
from dpt_ray.config.ladder import RUNGS, LabelsFrom
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.evaluation.advice import advice
from dpt_ray.evaluation.methods import BALANCED, METHODS, key_of, method_of
from dpt_ray.evaluation.records import (
    TRAINING_FRECHET_FILE,
    Difference,
    EvaluationResult,
    Gain,
    LadderRow,
    gain_over,
    read_evaluation,
)
from dpt_ray.evaluation.student import student_text
from dpt_ray.evaluation.swept import by_setting
from dpt_ray.learners.agreement import images_of_trial
from dpt_ray.learners.collapse import collapse
from dpt_ray.report import page
from dpt_ray.report.picture_rows import picture_rows
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Calibration, Facts, Manifest
from dpt_ray.training.log import read_log

PAGE = "report.html"
PICTURES = 8  # per class, of real and of generated images
LEARNERS = ("learner", "retrained_learner", "student")
LOSSES = {
    "encoder": "Encoder loss",
    "learner": "Learner loss",
    "retrained_learner": "Learner loss with generated images",
    "student": "Student loss",
    "feature_denoiser": "Feature denoiser loss",
    "denoiser": "Denoiser loss",
}
# Columns of a learner's log that show a collapse.
GUARDS = {"above_threshold": "share above threshold", "class_entropy": "class entropy"}


class ReportSettings(Settings):
    """The run's name, the rung that stage 2 has its labels from, and the configuration to be shown."""

    title: str
    labels_from: Annotated[LabelsFrom, HashedIfSet] = "probe"
    config: Annotated[str, NotHashed]


class Report(Stage[ReportSettings]):
    """`report.html`, from all artifacts of the run."""

    artifact = "report"
    settings = ReportSettings
    inputs = reads(
        {
            **{name: one_of(name) for name in ("index", "labels", "encoder")},
            # Optional are what is of generated images, and of generated features.
            "autoencoder": one_of("autoencoder", optional=True),
            "features": one_of("features"),
            "moments": one_of("moments", optional=True),
            **{name: one_of(name) for name in ("classifier", "pseudo_labels", "probe")},
            **{name: one_of(name, optional=True) for name in ("feature_denoiser", "feature_samples")},
            "generated_features": one_of("classifier", optional=True),
            "pilot": one_of("ladder", optional=True),
            "denoiser": one_of("denoiser", optional=True),
            # With the other sets of a sweep.
            "samples": one_of("samples", optional=True, several=True),
            "evaluation": one_of("evaluation"),
            "sample_features": one_of("features", optional=True, several=True),
            "retrained": one_of("classifier", optional=True),
            "augmented": one_of("augmented", optional=True, several=True),
            "augmented_features": one_of("features", optional=True, several=True),
            "sweep": one_of("sweep", optional=True),
            "referee": one_of("encoder", optional=True),
            "referee_features": one_of("features", optional=True),
            "referee_sample_features": one_of("features", optional=True),
            "inception": one_of("inception", optional=True),
            "inception_samples": one_of("inception_statistics", optional=True),
            "inception_reference": one_of("inception_statistics", optional=True),
            "image_metrics": one_of("image_metrics", optional=True),
            "graph": one_of("graph", optional=True),
            **{name: one_of("rung", optional=True) for name in (*RUNGS, "best")},
            "ladder": one_of("ladder", optional=True),
            # Of a learner that trains the encoder, in stage 1 and in stage 3, and of the student.
            **{name: one_of("encoder", optional=True) for name in LEARNERS},
            **{f"{name}_features": one_of("features", optional=True) for name in LEARNERS},
            **{f"{name}_classifier": one_of("classifier", optional=True) for name in LEARNERS},
            "learner_labels": one_of("pseudo_labels", optional=True),
        }
    )

    @classmethod
    def make(cls, task: Task[ReportSettings]) -> Facts:
        """Collect the data of the page and publish it."""
        data = _gather(task)
        task.out.write_bytes(PAGE, page.render_report(data).encode())
        return {"rows": len(data.stages)}


def _gather(task: Task[ReportSettings]) -> page.ReportData:
    inputs, settings = task.inputs, task.settings
    evaluation = read_evaluation(inputs["evaluation"])
    sweep = inputs["sweep"].manifest if "sweep" in inputs else None
    quality = evaluation["pseudo_labels"]
    calibration = inputs["pseudo_labels"].manifest["calibration"]
    return page.ReportData(
        title=settings.title,
        config_yaml=settings.config,
        started=task.run_started,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(inputs),
        hardware=f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        stages=[_stage(key, inputs[key], node.name in task.made) for key, node in task.node.inputs.items()],
        n_labels=evaluation["n_labels"],
        n_validation_labels=evaluation["accuracy"][0]["n_validation"],
        accuracies=accuracy_rows(evaluation),
        gain=headline(evaluation),
        student=student_text(evaluation["student"]) if "student" in evaluation else "",
        over_balanced=_pair(gain_over(evaluation, BALANCED)),
        ladder=[_rung(row) for row in evaluation.get("ladder", ())],
        advice=advice(evaluation.get("ladder", ())),
        labels_from=_labels_from(task),
        sweep=_swept(sweep) if sweep and sweep["n_validation"] else (),
        pseudo_label_classes=[page.ClassRow(**row) for row in quality["classes"]] if quality else [],
        pseudo_label_accuracy=quality["accuracy"] if quality else None,
        calibration=_calibration(calibration) if calibration["n"] else None,
        metrics=[*evaluation["frechet"], *evaluation["image_metrics"]["rows"]],
        metrics_left_out=evaluation["image_metrics"]["left_out"],
        grid=picture_rows(inputs["index"], inputs["samples"], PICTURES) if "samples" in inputs else (),
        resampled=_resampled(inputs["samples"].manifest) if "samples" in inputs else "",
        curves=_curves(inputs),
        curve_note=_curve_note(inputs["denoiser"]) if "denoiser" in inputs else "",
        quarantined=inputs["features"].manifest["quarantined"],
        warnings=[*_warnings(inputs["classifier"]), *_collapsed(inputs)],
    )


def accuracy_rows(evaluation: EvaluationResult) -> list[page.AccuracyRow]:
    """Return the accuracies with the methods' names."""
    return [
        page.AccuracyRow(
            method_of(row).name, row["validation"], row["test"], row["n_test"], row["note"], row["test_top5"]
        )
        for row in evaluation["accuracy"]
    ]


def headline(evaluation: EvaluationResult) -> page.Gain | None:
    """Return the gain with the methods' names, as in `accuracy_rows`."""
    if not (gain := evaluation["gain"]):
        return None
    baseline, improved = (METHODS[key_of(method)].name for method in (gain["baseline"], gain["improved"]))
    return page.Gain(baseline, improved, gain["stderr"], gain["kind"])


def _stage(name: str, artifact: Artifact, is_new: bool) -> page.StageRow:
    manifest = artifact.manifest
    return page.StageRow(
        name.replace("_", " "),
        f"{manifest['stage']}/{manifest['identity']}",
        "made" if is_new else "reused",
        manifest["seconds"],
        manifest.get("startup_seconds", 0.0),
        manifest.get("rows"),
        int(artifact.fs.du(artifact.path(""))),
        manifest.get("peak_memory_bytes") or None,
        manifest.get("gpu_hours"),
    )


def _rung(row: LadderRow) -> page.LadderRow:
    return page.LadderRow(
        METHODS[row["method"]].name,
        row["chosen_on"],
        row["score"],
        row["score_stderr"],
        row["n"],
        row["test"],
        _pair(row["over_probe"]),
        _pair(row["over_balanced"]),
        row["seconds"],
        page.LabelQuality(**labels) if (labels := row.get("labels")) else None,
    )


def _pair(found: Gain | Difference | None) -> tuple[float, float] | None:
    return None if found is None else (found["gain"], found["stderr"])


def _labels_from(task: Task[ReportSettings]) -> str:
    """Return the name of the rung that stage 2 has its labels from, "" where there is only the probe."""
    if task.settings.labels_from == "learner":
        return METHODS["semi_supervised"].name
    if task.settings.labels_from == "file":
        return "a table of the user's"
    if "ladder" not in task.inputs:
        return ""
    if "best" not in task.inputs:
        return METHODS[task.settings.labels_from].name
    return f"{METHODS[task.inputs['best'].manifest['best']].name}, the best on what rungs are chosen on"


def _swept(manifest: Manifest) -> list[page.SweepRow]:
    chosen = [best["shard"] for best in manifest["chosen"].values()]
    return [
        page.SweepRow(
            (trial := setting.first)["method"].replace("_", "-") + images_of_trial(trial),
            trial["images_per_class"],
            trial["real_weight"],
            trial["l2"],
            setting.top1 or 0.0,  # shown only where there are validation images
            trial["shard"] in chosen,
            len(setting.trials),
            setting.stderr,
        )
        for setting in by_setting(manifest["trials"])
    ]


def _calibration(facts: Calibration) -> page.Calibration:
    before, after = ([(p, a, n) for p, a, n in bins] for bins in (facts["bins_before"], facts["bins_after"]))
    return page.Calibration(
        facts["temperature"], facts["ece_before"], facts["ece_after"], facts["n"], before, after
    )


def _curves(inputs: Mapping[str, Artifact]) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    logs = {key: read_log(inputs[key]) for key in LOSSES if key in inputs}
    for key, records in logs.items():
        if records:
            curves[LOSSES[key]] = [(int(record["step"]), record["loss"]) for record in records]
    for key in LEARNERS:
        for column, shown in GUARDS.items():
            points = [(int(r["step"]), r[column]) for r in logs.get(key, ()) if column in r]
            if points:
                curves[f"{LOSSES[key].replace('loss', shown)}"] = points
    if records := [record for record in logs.get("denoiser", ()) if "frechet" in record]:
        guidance = records[-1]["frechet_guidance"]
        name = f"Frechet distance at guidance {guidance:g}"
        curves[name] = [(int(record["step"]), record["frechet"]) for record in records]
    return curves


def _warnings(stage1: Artifact) -> list[str]:
    classifier = stage1.manifest
    if not (lost := classifier.get("unreadable_labels")):
        return []
    drawn = classifier["labelled"] + lost
    return [f"{lost} of the {drawn} labelled images cannot be read; nothing was fitted on them."]


def _collapsed(inputs: Mapping[str, Artifact]) -> list[str]:
    """Return a warning for each learner whose teacher seems to have collapsed."""
    found = {key: collapse(read_log(inputs[key])) for key in LEARNERS if key in inputs}
    return [f"{key.replace('_', ' ').capitalize()}: {said}." for key, said in found.items() if said]


def _curve_note(denoiser: Artifact) -> str:
    """Return how the Frechet distances in the training's log were measured, "" where there are none."""
    if not denoiser.exists(TRAINING_FRECHET_FILE):
        return ""
    facts = denoiser.read_json(TRAINING_FRECHET_FILE)
    interval = facts["guidance_interval"]
    where = f" for t in [{interval[0]:g}, {interval[1]:g}]" if interval else ""
    return (
        f"The Frechet distance while training is that of {facts['n_generated']:,} images, sampled from the "
        f"averaged weights with guidance {facts['guidance']:g}{where} ({facts['solver']}, {facts['nfe']} "
        f"evaluations), to {facts['n_reference']:,} {facts['reference']} in the features of "
        f"{facts['extractor']}. It compares steps; it is not the distance in the table above."
    )


def _resampled(samples: Manifest) -> str:
    """Return how many images were sampled for those that were taken, "" where none was sampled again."""
    if "sampled" not in samples:
        return ""
    return (
        f"One that the classifier of the pseudo-labels did not take for its class was sampled again: "
        f"{samples['sampled']:,} were sampled for the {samples['rows']:,} that were taken, of which "
        f"{samples['passed']:,} pass."
    )


def _versions(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    packages = ("ray", "torch", "diffusers", "timm", "pyarrow", "scikit-learn")
    versions = {"Python": sys.version.split()[0]} | {name: version(name) for name in packages}
    return versions | {"dpt_ray": inputs["evaluation"].manifest["code"]}
