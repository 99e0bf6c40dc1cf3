"""report: one page with what ran and what it cost, the numbers and the pictures."""

from __future__ import annotations

import io
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from dpt_ray.data.crops import Crop
from dpt_ray.data.shards import read_images
from dpt_ray.data.units import decode_rows, find_rows, read_index
from dpt_ray.engine.node import Task
from dpt_ray.learners.training_frechet import FACTS
from dpt_ray.report import page
from dpt_ray.store.artifact import Artifact
from dpt_ray.training.log import read_log

PAGE = "report.html"
PICTURES = 8  # of each kind for each class
CLASSES_SHOWN = 40


def make(task: Task) -> dict[str, Any]:
    """Publishes `report.html`."""
    evaluation = task.inputs["evaluation"].manifest["result"]
    sweep = task.inputs.get("sweep")
    pseudo_labels = task.inputs["pseudo_labels"].manifest
    quality = evaluation["pseudo_labels"] or {"classes": [], "accuracy": None}
    bins = pseudo_labels["calibration"]
    gain = evaluation["gain"]
    data = page.ReportData(
        title=task.settings["title"],
        config_yaml=task.settings["config"],
        started=task.run_started,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(task),
        hardware=f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        stages=[_stage(key, artifact, task.run_started) for key, artifact in task.inputs.items()],
        n_labels=evaluation["n_labels"],
        n_validation_labels=evaluation["accuracy"][0]["n_validation"],
        accuracies=[
            page.AccuracyRow(
                row["name"], row["validation"], row["test"], row["n_test"], row["note"], row["test_top5"]
            )
            for row in evaluation["accuracy"]
        ],
        gain=page.Gain(gain["baseline"], gain["improved"], gain["stderr"], gain["kind"]) if gain else None,
        sweep=_trials(sweep.manifest) if sweep and sweep.manifest["n_validation"] else (),
        pseudo_label_classes=[page.ClassRow(**row) for row in quality["classes"]],
        pseudo_label_accuracy=quality["accuracy"],
        calibration=_calibration(bins) if bins["n"] else None,
        metrics=[
            page.Metric(**row) for row in (*evaluation["frechet"], *evaluation["image_metrics"]["rows"])
        ],
        metrics_left_out=evaluation["image_metrics"]["left_out"],
        grid=picture_rows(task.inputs["index"], task.inputs["samples"], PICTURES),
        curves=_curves(task),
        curve_note=_curve_note(task),
        quarantined=int(task.inputs["features"].manifest["quarantined"]),
        warnings=_warnings(task),
    )
    task.out.write_bytes(PAGE, page.render_report(data).encode())
    return {"rows": len(data.stages)}


def picture_rows(index: Artifact, samples: Artifact, count: int) -> list[page.GridRow]:
    """For each class (of the first 40) so many real test images and generated images; no others are read."""
    classes = index.read_json("classes.json")[:CLASSES_SHOWN]
    generated = _generated_images(samples, len(classes), count)
    real = _real_images(index, len(classes), generated[0][0].shape[0], count)
    return [page.GridRow(name, real[label], generated[label]) for label, name in enumerate(classes)]


def _generated_images(samples: Artifact, classes: int, count: int) -> list[list[np.ndarray]]:
    """The first `count` images of each class, or as many as there are: of the first few shards."""
    found: list[list[np.ndarray]] = [[] for _ in range(classes)]
    for table in read_images(samples):
        shown = table.filter(pc.less(table["class"], classes))
        for label, data in zip(shown["class"].to_pylist(), shown["image"], strict=True):
            if len(found[label]) < count:
                found[label].append(_pixels(data.as_py()))
        if all(len(images) == count for images in found):
            break
    return found


def _real_images(index: Artifact, classes: int, side: int, count: int) -> list[list[np.ndarray]]:
    """The first `count` test images of each class in the index, without those that cannot be read."""
    table = read_index(index, ["id", "split", "label"])
    test = table.filter(pc.and_(pc.equal(table["split"], "test"), pc.less(table["label"], classes)))
    chosen: list[list[str]] = [[] for _ in range(classes)]
    for identifier, label in zip(test["id"].to_pylist(), test["label"].to_pylist(), strict=True):
        if len(chosen[label]) < count:
            chosen[label].append(identifier)
    rows = find_rows(index, [identifier for ids in chosen for identifier in ids])
    found = decode_rows(rows, Crop("adm", side), index.manifest["mode"])
    return [[found[identifier] for identifier in ids if identifier in found] for ids in chosen]


def _pixels(png: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(png)))
    return image[:, :, None] if image.ndim == 2 else image


def _stage(name: str, artifact: Artifact, run_started: str) -> page.StageRow:
    manifest = artifact.manifest
    return page.StageRow(
        name.replace("_", " "),
        f"{manifest['stage']}/{manifest['identity']}",
        "made" if manifest["started"] >= run_started else "reused",
        manifest["seconds"],
        manifest.get("startup_seconds", 0.0),
        manifest.get("rows"),
        int(artifact.fs.du(artifact.path(""))),
        manifest.get("peak_memory_bytes") or None,
    )


def _trials(manifest: dict[str, Any]) -> list[page.SweepRow]:
    chosen = [best["shard"] for best in manifest["chosen"].values()]
    return [
        page.SweepRow(
            trial["method"].replace("_", "-"),
            trial["images_per_class"],
            trial["real_weight"],
            trial["l2"],
            trial["validation_top1"],
            trial["shard"] in chosen,
        )
        for trial in manifest["trials"]
    ]


def _calibration(facts: dict[str, Any]) -> page.Calibration:
    before, after = ([tuple(row) for row in facts[f"bins_{when}"]] for when in ("before", "after"))
    return page.Calibration(
        facts["temperature"], facts["ece_before"], facts["ece_after"], facts["n"], before, after
    )


def _curves(task: Task) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    for key, name in (("encoder", "Encoder loss"), ("denoiser", "Denoiser loss")):
        if records := read_log(task.inputs[key]):
            curves[name] = [(int(record["step"]), record["loss"]) for record in records]
    records = [record for record in read_log(task.inputs["denoiser"]) if "frechet" in record]
    if records:
        guidance = records[-1]["frechet_guidance"]
        name = f"Frechet distance at guidance {guidance:g}"
        curves[name] = [(int(record["step"]), record["frechet"]) for record in records]
    return curves


def _warnings(task: Task) -> list[str]:
    classifier = task.inputs["classifier"].manifest
    if not (lost := classifier.get("unreadable_labels")):
        return []
    drawn = classifier["labelled"] + lost
    return [f"{lost} of the {drawn} labelled images cannot be read; nothing was fitted on them."]


def _curve_note(task: Task) -> str:
    """What the Frechet distances of the training's log are distances of, where it has some."""
    denoiser = task.inputs["denoiser"]
    if not denoiser.exists(FACTS):
        return ""
    facts = denoiser.read_json(FACTS)
    interval = facts["guidance_interval"]
    where = f" for t in [{interval[0]:g}, {interval[1]:g}]" if interval else ""
    return (
        f"The Frechet distance while training is that of {facts['n_generated']:,} images, sampled from the "
        f"averaged weights with guidance {facts['guidance']:g}{where} ({facts['solver']}, {facts['nfe']} "
        f"evaluations), to {facts['n_reference']:,} {facts['reference']} in the features of "
        f"{facts['extractor']}. It compares steps; it is not the distance in the table above."
    )


def _versions(task: Task) -> dict[str, str]:
    packages = ("ray", "torch", "diffusers", "timm", "pyarrow", "scikit-learn")
    versions = {"Python": sys.version.split()[0]} | {name: version(name) for name in packages}
    return versions | {"dpt_ray": task.inputs["evaluation"].manifest["code"]}
