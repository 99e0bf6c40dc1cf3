"""The learners of stages 1 and 3 that train the encoder: its network, and the classifier on top of it.

In stage 3 the generated images join the labelled ones; the unlabelled images are the same in both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpt_ray.cluster import training
from dpt_ray.config import ConfigError
from dpt_ray.config.semi_supervised import LearnerSettings
from dpt_ray.data.class_ranges import locate_images, read_class_and_index
from dpt_ray.data.crops import Crop
from dpt_ray.data.decode import Mode
from dpt_ray.data.pixels import count_rows, fits_memory, load_pixels
from dpt_ray.data.raw_images import RawImages
from dpt_ray.data.rows import LABELS_FILE, RealRows, readable_labels
from dpt_ray.data.training_images import training_images
from dpt_ray.data.units import decode_rows, find_rows
from dpt_ray.engine.node import NoSettings, RunsOn, Stage, Task, one_of, reads
from dpt_ray.learners.collapse import collapse
from dpt_ray.learners.linear_classifier import HEAD, accuracy, load_classifier, logits, save_classifier
from dpt_ray.learners.pseudo_table import calibrate
from dpt_ray.store.records import Facts
from dpt_ray.training.log import read_log

if TYPE_CHECKING:
    from dpt_ray.learners.fine_tuned import FineTuned
    from dpt_ray.learners.semi_supervised import StudentTeacher
    from dpt_ray.training.optimizer import ParameterGroup
    from dpt_ray.training.workload import Batch, Worker


class Learner(Stage[LearnerSettings]):
    """An encoder's folder, and in `classifier/` the classifier that was trained with it."""

    artifact = "encoder"
    settings = LearnerSettings
    inputs = reads(
        {
            "index": one_of("index"),
            "labels": one_of("labels"),
            "encoder": one_of("encoder"),
            # What the head starts from, with the temperature of its confidences.
            "classifier": one_of("classifier", optional=True),
            "pseudo_labels": one_of("pseudo_labels", optional=True),
            "samples": one_of("samples", optional=True),
        }
    )
    runs_on = RunsOn.WORKERS

    @classmethod
    def version(cls, settings: LearnerSettings) -> int:
        """Return 2 where a supervised stage precedes: the teacher starts from its weights."""
        return 2 if settings.supervised_steps else 1

    @classmethod
    def make(cls, task: Task[LearnerSettings]) -> Facts:
        """Train and publish. Raises ConfigError where a class has no label, or no readable image."""
        index, labels = task.inputs["index"], task.inputs["labels"]
        _check_classes(task)
        rows, facts = count_rows(index), training.run(task, train)
        if said := collapse(read_log(task.out)):
            logging.getLogger("dpt_ray").warning("%s: %s", task.name, said)
        crop_fields = task.inputs["encoder"].manifest["crop"]
        return {**facts, "rows": rows, "labelled": labels.manifest["rows"], "crop": crop_fields}


class LearnerClassifier(Stage[NoSettings]):
    """The classifier of a learner as an artifact of its own, measured on the validation images."""

    artifact = "classifier"
    inputs = reads({"index": one_of("index"), "features": one_of("features"), "learner": one_of("encoder")})

    @classmethod
    def make(cls, task: Task[NoSettings]) -> Facts:
        """Publish a classifier's folder."""
        learner = task.inputs["learner"]
        real = RealRows(task.inputs["index"], task.inputs["features"], ("validation",))
        W, validation = load_classifier(learner, HEAD), real.validation
        facts: Facts = {
            "rows": learner.manifest["rows"],
            "labelled": learner.manifest["labelled"],
            "n_validation": len(validation),
            "validation_top1": accuracy(W, validation),
        }
        save_classifier(task.out, W, real.classes, facts)
        return {**facts, "calibration": calibrate(logits(validation.features, W), validation.labels)}


@dataclass(frozen=True)
class Labelled:
    """The labelled images and their class ids (n,): the real ones, and then the generated ones.

    Where either do not fit into memory, they are read from their files when asked for.
    """

    real: np.ndarray | RawImages
    generated: np.ndarray | RawImages | None
    labels: np.ndarray
    classes: Sequence[str]

    def __len__(self) -> int:
        """Return their number."""
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels (B, H, W, C) uint8 and class ids (B,) of rows (B,).

        The next image, with its label, stands for one that cannot be read. Raises ConfigError, naming the
        class, where no real image of its class can be read.
        """
        n, is_real, used = len(self.real), rows < len(self.real), rows.copy()
        real, used[is_real] = _read(self.real, rows[is_real])
        for label in np.unique(self.labels[rows[is_real & (used != rows)]]):
            self._check_readable(label)
        pixels = np.empty((len(rows), *real.shape[1:]), np.uint8)
        pixels[is_real] = real
        if self.generated is not None:
            pixels[~is_real], places = _read(self.generated, rows[~is_real] - n)
            used[~is_real] = places + n
        return pixels, self.labels[used]

    def _check_readable(self, label: int) -> None:
        """Raise ConfigError where no real image of the class `label` can be read."""
        of_class = np.flatnonzero(self.labels[: len(self.real)] == label)
        if not any(_read(self.real, row)[1] == row for row in of_class[:, None]):
            raise ConfigError(
                f"labels: no labelled image of class {self.classes[label]} can be read (the log says why); "
                "label other images of it, raise labels.per_class or change labels.seed"
            )


def _read(images: np.ndarray | RawImages, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels at `rows`, and the rows that they are of."""
    return images.read(rows) if isinstance(images, RawImages) else (images[rows], rows)


@dataclass(frozen=True)
class Images:
    """All training images, pixels (n, H, W, C) uint8, or read from their files; and the labelled ones."""

    unlabelled: np.ndarray | RawImages
    labelled: Labelled

    def batch(self, rows: np.ndarray, with_unlabelled: bool) -> Batch:
        """Return pixels (B, C, H, W), labels (B,) and pixels (B, ratio, C, H, W) of rows (B, 1 + ratio)."""
        import torch

        own, labels = self.labelled[rows[:, 0]]
        batch = {"image": torch.from_numpy(own).permute(0, 3, 1, 2), "label": torch.from_numpy(labels)}
        if with_unlabelled:
            others = torch.from_numpy(self.unlabelled[rows[:, 1:]])
            batch["unlabelled"] = others.permute(0, 1, 4, 2, 3)
        return batch


def train(task: Task[LearnerSettings], worker: Worker) -> None:
    """Train on one worker; publish encoder and classifier on rank 0."""
    import torch

    from dpt_ray.learners.encoder_learners import draw_function, passes, step_function
    from dpt_ray.learners.fine_tuned import publish
    from dpt_ray.learners.semi_supervised import StudentTeacher
    from dpt_ray.training.order import batch_rows
    from dpt_ray.training.throughput import forward_flops
    from dpt_ray.training.workload import Workload

    settings = task.settings
    student, images = _student(task), _images(task)
    classes = len(student.head)
    size = student.spec.crop.size
    student.freeze_unused(size)
    step_fn = step_function(settings, classes)
    first = settings.supervised_steps
    model = StudentTeacher(student, classes, settings.ema_decay, settings.threshold_momentum, first)
    ratio, batch_size = settings.unlabelled_ratio, settings.batch_size

    def order(step: int) -> np.ndarray:
        """Return rows (batch_size, 1 + ratio): a labelled image and its unlabelled ones."""
        labelled = batch_rows(2 * settings.seed, step, batch_size, len(images.labelled))
        others = batch_rows(2 * settings.seed + 1, step, batch_size * ratio, len(images.unlabelled))
        return np.column_stack([labelled, others.reshape(batch_size, ratio)])

    def load_batch(rows: np.ndarray, step: int) -> Batch:
        return images.batch(rows, settings.method != "supervised")

    channels = 1 if task.inputs["index"].manifest["mode"] == "L" else 3
    image = torch.empty(1, channels, size, size)
    flops = passes(settings.method, ratio) * forward_flops(student, image)
    workload = Workload(
        model,
        step_fn,
        load_batch,
        len(images.unlabelled),
        settings.group,
        order=order,
        flops_per_image=flops,
        before_step=model.before_step,
        parameter_groups=_parameter_groups(settings, model),
        extra_log=model.extra_log,
        prepare=draw_function(settings, size),
        # Beside a GPU the worker's cores draw; without one they train.
        load_processes=torch.get_num_threads() - 1 if worker.device.startswith("cuda") else 0,
        copied_steps=first,
    )
    ema = training.fit(task, worker, workload)
    if ema is not None:
        model.load_state_dict(ema)
        facts = {"method": settings.method, "steps": settings.steps}
        publish(task.out, student, task.inputs["index"].read_json("classes.json"), facts)


def _parameter_groups(settings: LearnerSettings, model: StudentTeacher) -> list[ParameterGroup] | None:
    """Return groups with layer-wise rates; None for one rate for all."""
    from dpt_ray.models.layer_decay import layer_decay_groups

    if settings.layer_decay is None:
        return None
    student = cast("FineTuned", model.student)
    return layer_decay_groups(model, student.network, settings.layer_decay, settings.weight_decay)


def _student(task: Task[LearnerSettings]) -> FineTuned:
    """Return the encoder with the head that it starts from. Raises ConfigError for an unsuitable one."""
    import torch

    from dpt_ray.learners.fine_tuned import FineTuned, random_head
    from dpt_ray.models.encoder import load_encoder

    encoder = load_encoder(task.inputs["encoder"].uri)
    if task.settings.head == "probe":
        # Divided by its temperature, the probe's confidences are those of its pseudo-labels.
        temperature = task.inputs["pseudo_labels"].manifest["calibration"]["temperature"]
        head = torch.from_numpy(load_classifier(task.inputs["classifier"]) / temperature)
    else:
        generator = torch.Generator().manual_seed(task.settings.seed)
        head = random_head(task.inputs["index"].manifest["classes"], encoder.dim, generator)
    return FineTuned(encoder, head)


def _images(task: Task[LearnerSettings]) -> Images:
    """Return the training images; with `samples` their first images of each class are labelled too."""
    index, how, generated = task.inputs["index"], _crop(task), None
    real, labels = _real(task, how)
    if "samples" in task.inputs:
        generated, their = _generated(task, how)
        labels = np.concatenate([labels, their])
    _, unlabelled = training_images(index, how, task.settings.max_bad_fraction)
    return Images(unlabelled, Labelled(real, generated, labels, index.read_json("classes.json")))


def _real(task: Task[LearnerSettings], how: Crop) -> tuple[np.ndarray | RawImages, np.ndarray]:
    """Return the labelled real images in the order of the list, and their class ids."""
    index, labels = task.inputs["index"], task.inputs["labels"]
    mode: Mode = index.manifest["mode"]
    table = pq.read_table(labels.local_file(LABELS_FILE), columns=["id", "label"])
    rows = find_rows(index, table["id"].to_pylist())
    if not fits_memory(rows.num_rows, how.size, mode):
        in_order = rows.take(pc.index_in(table["id"], value_set=rows["id"].combine_chunks()))
        images = RawImages(in_order, how, mode, task.settings.max_bad_fraction)
        return images, table["label"].to_numpy().astype(np.int64)
    found = decode_rows(rows, how, mode)
    table = readable_labels(labels, pa.array(list(found)), index.read_json("classes.json"))
    pixels = np.stack([found[identifier] for identifier in table["id"].to_pylist()])
    return pixels, table["label"].to_numpy().astype(np.int64)


def _generated(task: Task[LearnerSettings], how: Crop) -> tuple[np.ndarray | RawImages, np.ndarray]:
    """Return the first generated images of each class in the order of the shards, and their class ids.

    They are chosen from all that were generated: those must fit into memory to be held there.
    """
    samples, mode = task.inputs["samples"], task.inputs["index"].manifest["mode"]
    if not fits_memory(count_rows(samples), how.size, mode):
        rows = locate_images(samples)
        rows = rows.filter(pc.less(rows["index"], task.settings.images_per_class))
        images = RawImages(rows, how, mode, task.settings.max_bad_fraction)
        return images, rows["class"].to_numpy().astype(np.int64)
    table = read_class_and_index(samples)
    columns = (table[name].to_pylist() for name in ("id", "class", "index"))
    known = {identifier: (label, number) for identifier, label, number in zip(*columns, strict=True)}
    ids, pixels = load_pixels(samples, how, mode)
    found = np.array([known[identifier] for identifier in ids])
    kept = found[:, 1] < task.settings.images_per_class
    return pixels[kept], found[kept, 0].astype(np.int64)


def _crop(task: Task[LearnerSettings]) -> Crop:
    """Return the encoder's own crop; views that crop by themselves are drawn from all that it is cut from."""
    how = Crop(**task.inputs["encoder"].manifest["crop"])
    if task.settings.views == "photographs" and how.resize > how.size:
        return replace(how, size=how.resize)
    return how


def _check_classes(task: Task[LearnerSettings]) -> None:
    """Raise ConfigError where a class has no label: the learner would never predict it."""
    table = pq.read_table(task.inputs["labels"].local_file(LABELS_FILE), columns=["label"])
    names = task.inputs["index"].read_json("classes.json")
    lost = sorted(set(range(len(names))) - set(table["label"].to_pylist()))
    if lost:
        shown = ", ".join(names[label] for label in lost[:5])
        raise ConfigError(
            f"labels: no labelled image of {len(lost)} of the {len(names)} classes ({shown}): "
            "label one of each, or leave these classes out of the class list"
        )
