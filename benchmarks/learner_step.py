"""What a semi-supervised step costs: the stage's whole path against a bare PyTorch loop.

    python benchmarks/learner_step.py [--data /data/cifar10] [--rounds 3] [--steps 40]

FreeMatch and Semi-ViT train the ResNet of width 16 of configs/cifar10.yaml at 32 pixels, 32 labelled and 160
unlabelled images a step, 352 views. Each loop runs in processes of its own, the loops in turn, with as many
threads as there are cores in all. `--data` is a folder of CIFAR-10's Parquet files, of which the first images
are taken; without it images are random.

The stage (stages/learner.py) runs as in a run: one training loop, views by position, order, prefetch,
logs, non-finite guards, averages; in the driver's process (`train_workers: 0`) and through Ray Train on 1
and on 2 workers. Speeds are those of its log, which leaves out start-up and the writing of checkpoints.

The bare loop has what the method needs: the stage's own decoded images in memory, rows drawn by
torch.randint, views by the same torchvision transforms one image after the other in the thread that trains
(on one thread, as the stage draws), the same network, losses, thresholds and teacher, autocast in the same
precision, backward, fused AdamW at a constant rate; on two workers DDP over gloo, each with half of the
batch. It has no Ray, training.loop, prefetch, random numbers by position, seeds of views, logs,
checkpoints, gradient norm, guards, schedule, nor the loop's own averages beside the teacher's.

Ray's workers have malloc settings that the driver's process lacks, so the bare loop runs with both.
Writes benchmarks/results/learner_step_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from common import write_result
from processes import Environment, Facts, apart, mean_and_error, replica, workers, world
from train_loops import ROOT, SETTLED, Options, of_log, timed

from dpt_ray.cluster.session import ALLOCATOR, usable_cpus
from dpt_ray.config import Config, load_config

if TYPE_CHECKING:
    import torch

    from dpt_ray.config.semi_supervised import LearnerSettings
    from dpt_ray.engine.node import Task

METHODS = ("freematch", "semi_vit")
LABELLED, RATIO, GROUP = 32, 5, 16  # two workers have 16 labelled images each
IMAGES, TEST_IMAGES, SIZE, CLASSES = 4096, 128, 32, 10
EVERY = 5  # steps of one reading of the speed


# The inputs ----------------------------------------------------------------------------------------


def write_images(folder: Path, data: Path | None) -> None:
    """Write Parquet files of the first images of CIFAR-10's, or of random ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dpt_ray.data.shards import encode_png

    random = np.random.default_rng(0)
    folder.mkdir()
    for split, count in {"train": IMAGES, "test": TEST_IMAGES}.items():
        if data:
            table = pq.read_table(next(data.glob(f"*{split}*.parquet"))).slice(0, count)
        else:
            coarse = random.integers(0, 256, (count, SIZE // 4, SIZE // 4, 3), np.uint8)
            pixels = coarse.repeat(4, 1).repeat(4, 2)  # smooth, since some transforms depend on the content
            files = [{"bytes": encode_png(image)} for image in pixels]
            table = pa.table({"image": files, "label": np.arange(count) % CLASSES})
        pq.write_table(table, folder / f"{split}.parquet")


def configured(options: Options, folder: Path, method: str, train_workers: int) -> Config:
    """Return the configuration of a run; the encoder is hardly trained, since that changes no speed."""
    pretrain = ("steps=1", "warmup_steps=0", "batch_size=32", "contrast_group=16", "precision=float32")
    learner = (
        *(f"batch_size={LABELLED}", f"unlabelled_ratio={RATIO}", f"group={GROUP}", "unlabelled_weight=1"),
        *(f"steps={options.steps}", "warmup_steps=0", "head=random", f"precision={options.precision}"),
        *(f"log_every={EVERY}", f"checkpoint_every={options.steps}"),
    )
    compute = (f"train_workers={train_workers}", f"cpus={usable_cpus()}", f"threads={threads(train_workers)}")
    sections = {"pretrain": pretrain, "semi_supervised": learner, "compute": compute}
    told = [f"{name}.{setting}" for name, settings in sections.items() for setting in settings]
    told += [f"output={folder / 'outputs'}", f"data.uri={folder / 'images'}", f"classifier.learner={method}"]
    return load_config(ROOT / "configs" / "cifar10_freematch.yaml", told)


def threads(processes: int) -> int:
    """Return the threads of each of so many processes; 0 stands for the driver's."""
    return max(1, usable_cpus() // max(1, processes))


def write_inputs(options: Options, folder: Path) -> None:
    """Make the index, the labels and the encoder, by a run."""
    from rich.console import Console

    from dpt_ray.engine.progress import Display
    from dpt_ray.pipeline.run import run

    write_images(folder / "images", options.data)
    run(configured(options, folder, METHODS[0], 0), Display(Console(quiet=True)), ("labels", "encoder"))


def task_of(options: Options, folder: Path) -> Task[LearnerSettings]:
    """Return the task of the learner as a run has it, with an output folder that nobody has written to."""
    from dpt_ray.engine.node import Task
    from dpt_ray.pipeline.flow import flow
    from dpt_ray.store.artifact import Store

    config = configured(options, folder, options.method, options.workers)
    node, store = flow(config)["learner"], Store(f"{folder / 'outputs'}")
    inputs = {key: source.artifact(store) for key, source in node.inputs.items()}
    out = store.artifact("encoder", f"{options.method}-{time.time_ns()}")
    return Task(node, cast("LearnerSettings", node.settings), out, inputs, config.compute, "")


# The loops, each in processes of its own -----------------------------------------------------------


def stage(options: Options, folder: Path) -> Facts:
    """The stage, on inputs published as a run publishes them."""
    from dpt_ray.stages.learner import Learner
    from dpt_ray.training.log import read_log

    task = task_of(options, folder)
    startup, found = Learner.make(task)["startup_seconds"], of_log(read_log(task.out))
    # The log counts labelled images.
    return {**found, "images_per_s": (1 + RATIO) * found["images_per_s"], "startup": startup}


class PlainRandom:
    """torch's own random numbers in place of those by position, for the losses."""

    def uniform(self, name: str, shape: Sequence[int] = ()) -> torch.Tensor:
        import torch

        return torch.rand(LABELLED // world()[1], *shape)


def bare(options: Options, folder: Path) -> Facts:
    """The plain loop; one of several workers has its part of the batch."""
    import torch

    from dpt_ray.learners.encoder_learners import step_function
    from dpt_ray.learners.semi_supervised import StudentTeacher
    from dpt_ray.stages.learner import _student

    (rank, size), task = world(), task_of(options, folder)
    torch.set_num_threads(threads(size))
    settings, student = task.settings, _student(task)
    student.freeze_unused(SIZE)
    core = StudentTeacher(student, CLASSES, settings.ema_decay, settings.threshold_momentum).train()
    model, loss_of, batches = replica(core), step_function(settings, CLASSES), plain_batches(task)
    trained = [p for p in core.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, fused=True)
    torch.manual_seed(rank)

    def steps() -> Iterator[torch.Tensor]:
        for step, batch in enumerate(batches):
            core.before_step(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = loss_of(model, batch, PlainRandom())  # type: ignore[arg-type]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    told = {"batch": LABELLED // size * (1 + RATIO), "device": "cpu", "every": EVERY}
    return timed(steps(), Options(**{**vars(options), **told}))


def plain_batches(task: Task[LearnerSettings]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of views of images that are drawn with replacement."""
    import torch

    from dpt_ray.learners.encoder_learners import VIEWS
    from dpt_ray.stages.learner import _images

    images, views = _images(task), VIEWS[task.settings.views](SIZE)
    of_labelled = views.weak if task.settings.method == "freematch" else views.strong
    own, threads_of_model = LABELLED // world()[1], torch.get_num_threads()

    def drawn(pixels: torch.Tensor, transform: Any) -> torch.Tensor:
        return torch.stack([transform(image) for image in pixels])

    while True:
        pixels, labels = images.labelled[torch.randint(len(images.labelled), (own,)).numpy()]
        others = images.unlabelled[torch.randint(len(images.unlabelled), (own * RATIO,)).numpy()]
        labelled, unlabelled = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (pixels, others))
        torch.set_num_threads(1)
        batch = {"label": torch.from_numpy(labels), "labelled": drawn(labelled, of_labelled)}
        for name, transform in views._asdict().items():
            batch[name] = drawn(unlabelled, transform).unflatten(0, (own, RATIO))
        torch.set_num_threads(threads_of_model)
        yield batch


# All of them ---------------------------------------------------------------------------------------

LOOPS = {"bare": bare, "stage": stage}


class Arm(NamedTuple):
    """A row: which loop, on how many workers (0: the driver's process), and the row it is held against."""

    loop: str
    workers: int
    environment: Environment
    against: str = ""


ARMS = {
    "bare loop, malloc's settings": Arm("bare", 0, {}),
    "bare loop": Arm("bare", 0, ALLOCATOR),
    "the driver's process": Arm("stage", 0, {}, "bare loop, malloc's settings"),
    "Ray Train, 1 worker": Arm("stage", 1, ALLOCATOR, "bare loop"),
    "bare DDP, 2 workers": Arm("bare", 2, ALLOCATOR),
    "Ray Train, 2 workers": Arm("stage", 2, ALLOCATOR, "bare DDP, 2 workers"),
}
COLUMNS = ["learner", "loop", "threads", "images/s", "of the bare one", "data wait", "start-up"]


def run_arm(arm: Arm, method: str, options: Options, folder: Path) -> Facts:
    """Run a loop; return the facts of its first process, with the speed of all."""
    told = {"only": arm.loop, "method": method, "workers": arm.workers, "folder": folder}
    told |= {"steps": options.steps, "precision": options.precision}
    command = [__file__, *(f"--{key}={value}" for key, value in told.items())]
    several = arm.loop == "bare" and arm.workers > 1
    processes = workers(arm.workers, arm.environment) if several else [arm.environment]
    facts = apart(command, processes)
    return {**facts[0], "images_per_s": sum(one["images_per_s"] for one in facts)}


def rows(method: str, options: Options, folder: Path) -> list[str]:
    """Return the lines of a method; the loops have taken turns."""
    found: dict[str, list[Facts]] = {name: [] for name in ARMS}
    for _ in range(options.rounds):
        for name, arm in ARMS.items():
            found[name].append(run_arm(arm, method, options, folder))
    speeds = {name: [facts["images_per_s"] for facts in runs] for name, runs in found.items()}
    lines = []
    for name, arm in ARMS.items():
        runs, against, last = found[name], speeds.get(arm.against), [""] * 2
        ratio = [a / b for a, b in zip(speeds[name], against, strict=True)] if against else []
        if arm.loop == "stage":
            wait, startup = (mean(facts[key] for facts in runs) for key in ("data_wait", "startup"))
            last = [f"{100 * wait:.1f}%", f"{startup:.0f} s"]
        speed = f"{mean(speeds[name]):.0f}"
        values = [
            method,
            name,
            str(threads(arm.workers)),
            speed,
            mean_and_error(ratio) if ratio else "",
            *last,
        ]
        lines.append(f"| {' | '.join(values)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--only", choices=LOOPS, help="one loop in this process, its measures as JSON")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args(namespace=Options())
    if options.only:
        facts = LOOPS[options.only](options, options.folder)
        sys.stdout.write(f"\n{json.dumps(facts)}\n")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options.precision = resolved_precision(options, folder)
        write_inputs(options, folder)
        lines = [line for method in METHODS for line in rows(method, options, folder)]
    given = " --data /data/cifar10" if options.data else ""
    images = (
        f"the first {IMAGES:,} training images of CIFAR-10" if options.data else f"{IMAGES:,} random images"
    )
    how = f"""`python benchmarks/learner_step.py{given} --rounds {options.rounds} --steps {options.steps}`

{LABELLED} labelled and {LABELLED * RATIO} unlabelled images a step, all of which images/s counts; {images}, \
{options.precision}. Medians of readings every {EVERY} steps, the first {SETTLED} left out; start-up apart. \
Means of {options.rounds} rounds with standard errors; ratios are within a round. The driver's process is \
held against the bare loop with malloc's settings, which it has, 1 worker against that with Ray's, 2 workers \
against DDP over gloo. Threads are of each process. The script's docstring lists what the bare loop has."""
    packages = ("torch", "torchvision", "ray")
    write_result("learner_step", "A semi-supervised training step", how, COLUMNS, lines, packages)


def resolved_precision(options: Options, folder: Path) -> str:
    """Return the learner's precision on this machine, the same for every loop."""
    from dpt_ray.models.precision import resolve_precisions

    section = resolve_precisions(configured(options, folder, METHODS[0], 0)).semi_supervised
    assert section is not None
    return section.precision


if __name__ == "__main__":
    main()
