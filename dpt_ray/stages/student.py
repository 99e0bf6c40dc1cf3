"""student: a small network for serving, distilled from a classifier of the run on all training images."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, cast

import numpy as np

from dpt_ray.cluster import training
from dpt_ray.config.hashing import NotHashed
from dpt_ray.config.student import StudentTraining
from dpt_ray.config.values import Count, Fraction
from dpt_ray.data.crops import Crop
from dpt_ray.data.pixels import count_rows
from dpt_ray.data.rows import RealRows, TrainingFeatures, row_normalise
from dpt_ray.data.training_images import training_images
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.evaluation.methods import method_of_teacher
from dpt_ray.learners.linear_classifier import load_classifier, logits, probabilities
from dpt_ray.learners.pseudo_table import calibrate
from dpt_ray.store.records import Calibration, CropFields, Facts

if TYPE_CHECKING:
    from dpt_ray.training.workload import Batch, Worker


class StudentSettings(StudentTraining):
    """The training, the side of the images, and the name of the teacher, which counts by its identity."""

    image_size: Count
    teacher: Annotated[str, NotHashed]
    max_bad_fraction: Annotated[Fraction, NotHashed] = 0.001


class Student(Stage[StudentSettings]):
    """An encoder's folder, and in `classifier/` the classifier that was trained with it."""

    artifact = "encoder"
    settings = StudentSettings
    inputs = reads(
        {
            "index": one_of("index"),
            "features": one_of("features"),  # the teacher's
            "teacher": one_of("classifier", "rung"),
        }
    )
    runs_on = RunsOn.WORKERS

    @classmethod
    def make(cls, task: Task[StudentSettings]) -> Facts:
        """Train and publish."""
        if not _calibration(task)["n"]:
            logging.getLogger("dpt_ray").warning(
                "%s: the confidences of %s could not be calibrated; where they are too even, a lower "
                "student.temperature sharpens them",
                task.name,
                task.settings.teacher,
            )
        rows, facts = count_rows(task.inputs["index"]), training.run(task, train)
        return {**facts, "rows": rows, "labelled": 0, "crop": cast(CropFields, asdict(_crop(task)))}


def train(task: Task[StudentSettings], worker: Worker) -> None:
    """Train on one worker; publish encoder and classifier on rank 0."""
    import torch

    from dpt_ray.learners.distillation import distillation_step, draw_weak
    from dpt_ray.learners.fine_tuned import FineTuned, publish, random_head
    from dpt_ray.models.encoder import Encoder
    from dpt_ray.models.own_networks import own_network
    from dpt_ray.training.throughput import forward_flops
    from dpt_ray.training.workload import Workload

    settings, index, features = task.settings, task.inputs["index"], task.inputs["features"]
    size, tau = settings.image_size, settings.temperature
    unreadable = [bad[0] for shard in features.listed_shards() for bad in shard.get("bad", ())]
    ids, images = training_images(index, _crop(task), settings.max_bad_fraction, unreadable)
    teacher, W = TrainingFeatures(features, ids), load_classifier(task.inputs["teacher"])
    calibrated = _calibration(task)["temperature"]
    generator = torch.Generator().manual_seed(settings.seed)
    channels = 1 if index.manifest["mode"] == "L" else 3
    network, spec = own_network(settings, channels, size, generator)
    student = FineTuned(Encoder(network, spec), random_head(len(W), spec.dim, generator))

    def load_batch(rows: np.ndarray, step: int) -> Batch:
        # P_T(y | x; tau) = softmax(W r / (T tau)), T being the temperature at which the teacher is calibrated
        targets = probabilities(row_normalise(teacher.rows(rows)), W, calibrated * tau)
        pixels = torch.from_numpy(images[rows]).permute(0, 3, 1, 2)
        return {"image": pixels, "target": torch.from_numpy(targets.astype(np.float32))}

    workload = Workload(
        student,
        distillation_step(tau),
        load_batch,
        len(images),
        # A backward pass costs two forward passes: the gradients of the weights and of the input.
        flops_per_image=3 * forward_flops(student, torch.empty(1, channels, size, size)),
        prepare=draw_weak(settings.views, size),
        # Beside a GPU the worker's cores draw; without one they train.
        load_processes=torch.get_num_threads() - 1 if worker.device.startswith("cuda") else 0,
    )
    ema = training.fit(task, worker, workload)
    if ema is not None:
        student.load_state_dict(ema)
        facts = {"method": "distillation", "teacher": _method(task), "steps": settings.steps}
        publish(task.out, student, index.read_json("classes.json"), facts)


def _calibration(task: Task[StudentSettings]) -> Calibration:
    """Return the teacher's calibration: its own, else that on the validation images."""
    teacher = task.inputs["teacher"]
    if found := teacher.manifest.get("calibration"):
        return found
    validation = RealRows(task.inputs["index"], task.inputs["features"], ("validation",)).validation
    return calibrate(logits(validation.features, load_classifier(teacher)), validation.labels)


def _method(task: Task[StudentSettings]) -> str:
    """Return the key of the teacher's method: that of the rung where it is the ladder's best."""
    name = task.settings.teacher
    return task.inputs["teacher"].manifest["best"] if name == "best" else method_of_teacher(name)


def _crop(task: Task[StudentSettings]) -> Crop:
    return Crop("adm", task.settings.image_size)
