"""The sampling stage against a bare loop over the same network, and against the paper's way of sampling.

    python benchmarks/sampling.py [--steps 1500] [--images 1280] [--seeds 3]

A U-ViT of 18 tokens learns the digits. Then it is sampled by
- the paper's way, as its public code does it: float32, two forwards for each step of guidance, batches of 20,
  50 steps of DPM-Solver, one class after another, the main process writing PNG files;
- the stage through Ray, by the same solver and steps, and by the fast preset: 25 steps of DPM-Solver++ (2M),
  guidance on half of them. Its start-up is left out, it is stated apart;
- a bare loop over the batches of the stage, which writes nothing.
Everything has one thread of the processor. The distance is Fréchet's to all real digits, in the features of
the run's own encoder, mean and standard error over sampling seeds; the floor is that of halves of the digits.
Writes benchmarks/results/sampling_DATE.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DIGITS, dpt, write_result
from PIL import Image

from dpt_ray.config import load_config
from dpt_ray.data.class_ranges import class_ranges, items
from dpt_ray.data.crops import Crop, crop
from dpt_ray.data.decode import decode
from dpt_ray.data.pixels import load_pixels
from dpt_ray.data.shards import read_images
from dpt_ray.diffusion.loss import to_noise_and_data
from dpt_ray.diffusion.schedules import SCHEDULES
from dpt_ray.diffusion.solvers import SOLVERS
from dpt_ray.evaluation.frechet import FeatureStatistics, frechet_distance
from dpt_ray.models.autoencoder import load_autoencoder
from dpt_ray.models.denoiser import load_denoiser
from dpt_ray.models.encoder import load_encoder
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.samples import GenerateUnit, Sampler
from dpt_ray.store.artifact import Artifact, Store

GUIDANCE, BATCH = 1.4, 20
AS_IT_IS = Crop("none", 8)
PAPER = ("generate.solver=dpm_solver_fast", "generate.nfe=50", "generate.guidance_interval=null")
FAST = ("generate.solver=dpm_solver_pp_2m", "generate.nfe=25", "generate.guidance_interval=[0.0,0.5]")

TRAINED = (
    *("diffusion.model.patch_size=2", "diffusion.model.dim=96", "diffusion.batch_size=64"),
    *(
        "sweep=null",
        "compute.train_workers=0",
        "compute.actors=1",
        "compute.threads=1",
        "autoencoder.precision=float32",
    ),
)


@dataclass(frozen=True)
class Run:
    """A run of the digits whose denoiser is trained, and what its samples are compared with."""

    folder: Path
    given: tuple[str, ...]

    def artifact(self, name: str, *overrides: str) -> Artifact:
        """An artifact of the run with these settings."""
        config = load_config(DIGITS, [*self.given, *overrides])
        return flow(config)[name].artifact(Store(config.output))


class Judge:
    """The Frechet distance of images to all real digits, in the features of the run's encoder."""

    def __init__(self, run: Run) -> None:
        self.encoder = load_encoder(run.artifact("encoder").uri)
        index = run.artifact("index")
        splits = ("train", "validation", "test")
        real = np.concatenate([load_pixels(index, AS_IT_IS, "L", split)[1] for split in splits])
        features = self.features(real)
        self.real = FeatureStatistics.of(features)
        halves = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).chunk(2)
        self.floor = frechet_distance(*(FeatureStatistics.of(features[half]) for half in halves))

    def features(self, images: np.ndarray) -> torch.Tensor:
        """The features (n, dim) of images (n, H, W, C) uint8."""
        with torch.no_grad():
            return torch.cat([self.encoder(part) for part in torch.from_numpy(images).split(256)])

    def __call__(self, images: np.ndarray) -> float:
        """The distance of these images."""
        return frechet_distance(FeatureStatistics.of(self.features(images)), self.real)


def papers_way(run: Run, per_class: int, seed: int, folder: Path) -> tuple[float, np.ndarray]:
    """Images/s and the images (n, H, W, C) uint8 of the paper's way."""
    torch.set_num_threads(1)
    model, config = load_denoiser(run.artifact("denoiser").uri)
    autoencoder = load_autoencoder(run.artifact("autoencoder").uri, "float32")
    schedule, null = SCHEDULES[config["schedule"]], int(config["model"]["num_classes"])
    torch.manual_seed(seed)
    made: list[np.ndarray] = []
    started = time.perf_counter()
    for label in range(null):
        for first in range(0, per_class, BATCH):
            n = min(BATCH, per_class - first)
            labels, nothing = torch.full((n,), label), torch.full((n,), null)

            def denoise(x: torch.Tensor, t: float, labels: Any = labels, nothing: Any = nothing) -> Any:
                moment = torch.tensor(t, dtype=torch.float64)
                times = torch.full((len(x),), float(schedule.network_time(moment)))
                conditional, unconditional = model(x, times, labels), model(x, times, nothing)
                output = unconditional + GUIDANCE * (conditional - unconditional)
                return to_noise_and_data(config["prediction"], output, x, moment, schedule)

            with torch.no_grad():
                noise = torch.randn(n, *autoencoder.latent_shape)
                latents = SOLVERS["dpm_solver_fast"](denoise, noise, schedule, 50)
                images = autoencoder.decode(latents).numpy()
            for number, image in enumerate(images):
                Image.fromarray(image.squeeze(-1)).save(folder / f"{label}_{first + number}.png")
            made += list(images)
    return len(made) / (time.perf_counter() - started), np.stack(made)


def stage(run: Run, seed: int, settings: Sequence[str]) -> tuple[float, float, np.ndarray]:
    """Images/s of the stage without its start-up, the seconds of the start-up, and the images."""
    told = (f"generate.guidance={GUIDANCE}", f"generate.seed={seed}", *settings)
    dpt("generate", DIGITS, *run.given, *told)
    samples = run.artifact("samples", *told)
    files = [data for part in read_images(samples) for data in part["image"].to_pylist()]
    together = np.stack([crop(decode(data, "L"), AS_IT_IS) for data in files])
    startup = samples.manifest["startup_seconds"]
    return len(together) / (samples.manifest["seconds"] - startup), startup, together


def bare(run: Run, seed: int, settings: Sequence[str]) -> float:
    """Images/s of the batches of the stage alone, in this process, with one thread."""
    told = (f"generate.guidance={GUIDANCE}", f"generate.seed={seed}", *settings)
    config = load_config(DIGITS, [*run.given, *told])
    node, store = flow(config)["samples"], Store(config.output)
    sources = {name: source.artifact(store).uri for name, source in node.inputs.items()}
    actor = GenerateUnit(
        Sampler(
            node.artifact(store),
            sources["denoiser"],
            sources["autoencoder"],
            "",
            config.compute.batch_size,
            1,
            node.settings,
        )
    )
    units = class_ranges(config.generate.images_per_class, node.settings.indices_per_shard, 10)
    chosen = [items(unit) for unit in units]
    actor._sample(chosen[0])
    started = time.perf_counter()
    for some in chosen:
        actor._sample(some)
    return sum(map(len, chosen)) / (time.perf_counter() - started)


def mean(values: Sequence[float]) -> str:
    """The mean of values and its standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):.2f} ± {error:.2f}"


def measure(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the lines of the table, and what follows it."""
    per_class = options.images // 10
    counts = (f"generate.images_per_class={per_class}", f"retrain.images_per_class={per_class}")
    run = Run(folder, (*TRAINED, *counts, f"diffusion.steps={options.steps}", f"output={folder / 'out'}"))
    dpt("train-diffusion", DIGITS, *run.given)
    judge = Judge(run)
    ways = {"the stage, the paper's solver": PAPER, "the stage, the fast preset": FAST}
    speed: dict[str, list[float]] = {name: [] for name in ("the paper's way", *ways, "bare loop")}
    distance: dict[str, list[float]] = {name: [] for name in speed}
    startups = []
    for seed in range(options.seeds):  # one after another, so that load on the machine meets all of them
        (folder / f"png{seed}").mkdir()
        rate, images = papers_way(run, per_class, seed, folder / f"png{seed}")
        speed["the paper's way"].append(rate)
        distance["the paper's way"].append(judge(images))
        for name, settings in ways.items():
            rate, startup, images = stage(run, seed, settings)
            speed[name].append(rate)
            distance[name].append(judge(images))
            startups.append(startup)
        speed["bare loop"].append(bare(run, seed, FAST))
    of_paper = np.array(speed["the paper's way"])
    for name, rates in speed.items():
        ratio = mean(list(np.array(rates) / of_paper))
        yield f"| {name} | {mean(rates)} | {ratio} | {mean(distance[name]) if distance[name] else ''} |"
    ratio = np.array(speed["the stage, the fast preset"]) / np.array(speed["bare loop"])
    yield ""
    yield (
        f"The stage makes {mean(list(ratio))} of the bare loop's images/s with the fast preset; its start-up "
        f"takes {mean(startups)} s. The floor of the distance, halves of the real digits: {judge.floor:.2f}."
    )


def main() -> None:
    """Measure and write the result."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=1500, help="of the denoiser's training")
    parser.add_argument("--images", type=int, default=1280, help="of all classes together")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lines = list(measure(options, Path(scratch)))
    told = f"--steps {options.steps} --images {options.images} --seeds {options.seeds}"
    how = (
        f"`python benchmarks/sampling.py {told}`: the digits, guidance {GUIDANCE}, float32, one thread; mean "
        "and standard error over sampling seeds."
    )
    columns = ("", "images/s", "times the paper's way", "Fréchet distance")
    write_result("sampling", "Sampling", how, columns, lines, ["torch", "ray"])


if __name__ == "__main__":
    main()
