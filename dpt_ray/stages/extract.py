"""extract: one streaming pass with one decode per image, for all outputs of the same images.

An output is an artifact: the features of an encoder, or the moments of an autoencoder (training images
only). A task reads and decodes a work unit; an actor computes and publishes it.
Unreadable images are listed in `quarantine.parquet`, and too many of them end the run. Non-finite numbers
end it at once: the cause is the model or its precision, rarely an image, and one such row corrupts every
fit and mean that includes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpt_ray.cluster.units import Result, peak_memory, run_actors, suspect, unit_call
from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import NotHashed, Settings
from dpt_ray.config.sections import Fraction, ResolvedPrecision
from dpt_ray.data.apart import apart
from dpt_ray.data.crops import Crop
from dpt_ray.data.decoded import decode_unit
from dpt_ray.data.units import Unit, list_units, split_of
from dpt_ray.engine.node import RunsOn, Stage, Task, one_of, reads
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.records import Facts

if TYPE_CHECKING:
    import torch

    from dpt_ray.models.autoencoder import Autoencoder

QUARANTINE = "quarantine.parquet"
NAMED = 5  # unreadable images named in an error

IMAGES = one_of("index", "samples", "augmented")


class FeatureSettings(Settings):
    """How features are computed."""

    precision: ResolvedPrecision
    max_bad_fraction: Annotated[Fraction, NotHashed]


S = TypeVar("S", bound=FeatureSettings)


class MomentSettings(FeatureSettings):
    """How moments are computed; `flips` adds those of the mirrored image."""

    flips: bool


class _Extracted(Stage[S]):
    """An artifact that one pass over the images makes together with others."""

    runs_on = RunsOn.ACTORS

    @classmethod
    def make(cls, task: Task[S]) -> Facts:
        """Publish the missing shards."""
        return cls.make_together([task])[0]

    @classmethod
    def make_together(cls, tasks: Sequence[Task[FeatureSettings]]) -> list[Facts]:
        """Publish the missing shards of all features and moments of the same images."""
        return extract(tasks)


class Features(_Extracted[FeatureSettings]):
    """Rows of `id` and `feature` for the images of every split."""

    artifact = "features"
    settings = FeatureSettings
    inputs = reads({"images": IMAGES, "encoder": one_of("encoder")})


class Moments(_Extracted[MomentSettings]):
    """Rows of `id` and `moments` (mean and log-variance of the latents) for the training images."""

    artifact = "moments"
    settings = MomentSettings
    inputs = reads({"images": IMAGES, "autoencoder": one_of("autoencoder")})


class Extracted(Result):
    """The result of a unit, and the outputs that it was published to."""

    wanted: list[str]


class Wanted(TypedDict):
    """A work unit and the names of the outputs that lack it."""

    shard: str
    unit: Unit
    wanted: list[str]


class Decoded(TypedDict):
    """A decoded unit as a row of Ray Data; the pixels for each distinct crop are further columns.

    A line of `bad` is the id and the reason of an unreadable image, separated by a tab.
    """

    shard: str
    wanted: list[str]
    ids: list[str]
    bad: list[str]
    peak_memory_bytes: int


@dataclass(frozen=True)
class Output:
    """An artifact to fill; `model` is the URI of the encoder's or autoencoder's folder."""

    name: str
    out: Artifact
    model: str
    crop: Crop
    is_encoder: bool
    precision: ResolvedPrecision
    max_bad_fraction: float
    flips: bool = False
    compile: bool = False


def extract(tasks: Sequence[Task[FeatureSettings]]) -> list[Facts]:
    """Publish the missing shards of every output in one pass over their images."""
    first = tasks[0]
    images = first.inputs["images"]
    outputs = [_output(task) for task in tasks]
    done = {output.name: set(output.out.shards()) for output in outputs}
    missing: list[Wanted] = []
    for unit in list_units(images):
        wanted = [o.name for o in outputs if _wants(o, unit) and unit["shard"] not in done[o.name]]
        if wanted:
            missing.append({"shard": unit["shard"], "unit": unit, "wanted": wanted})
    facts: Facts = {"startup_seconds": 0.0, "peak_memory_bytes": 0, "reader_peak_memory_bytes": 0}
    if missing:
        facts = run_actors(
            missing,
            ExtractUnit,
            lambda threads: {
                "outputs": outputs,
                "batch_size": first.compute.batch_size,
                "threads": threads,
            },
            first.compute,
            first.progress,
            read=DecodeUnit(images, {output.name: output.crop for output in outputs}),
            count=BadImages(outputs, images).count,
            images=sum(work["unit"]["rows"] for work in missing),
        )
    return [_collect(output, images, facts) for output in outputs]


class DecodeUnit:
    """Read and decode a unit: uint8 pixels for each output's crop, and the unreadable images."""

    def __init__(self, images: Artifact, crops: dict[str, Crop]) -> None:
        self.images, self.crops = images, crops
        self.mode = images.manifest["mode"]

    @unit_call
    def __call__(self, work: Wanted) -> Decoded:
        """Return the decoded unit.

        Pixels are arrays because Ray Data passes them to the actor without a copy; bytes would be copied.
        """
        wanted = {repr(crop): crop for crop in (self.crops[name] for name in work["wanted"])}
        with apart(wanted, self.mode) if suspect() else nullcontext() as pixels_of:
            ids, pixels, bad = decode_unit(self.images, work["unit"], wanted, self.mode, pixels_of)
        # All rows need the same columns, and none may be empty.
        none = np.zeros((1, 1, 1, 1), np.uint8)
        columns = {repr(crop): none for crop in self.crops.values()}
        decoded: Decoded = {
            "shard": work["shard"],
            "wanted": list(work["wanted"]),
            "ids": ids,
            "bad": [f"{identifier}\t{reason}" for identifier, reason in bad],
            "peak_memory_bytes": peak_memory(),
        }
        return cast(Decoded, {**decoded, **columns, **(pixels if ids else {})})


class ExtractUnit:
    """An actor that runs the models on a unit and publishes its shards."""

    def __init__(self, outputs: list[Output], batch_size: int, threads: int) -> None:
        import torch

        from dpt_ray.models.autoencoder import load_autoencoder
        from dpt_ray.models.batches import Batches
        from dpt_ray.models.encoder import load_encoder

        torch.set_num_threads(threads)
        self.computing = threading.Lock()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.outputs = {output.name: output for output in outputs}
        self.batches = {output.name: Batches(batch_size) for output in outputs}
        self.compute: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
        for output in outputs:
            if output.is_encoder:
                encoder = load_encoder(output.model, output.precision).to(self.device)
                if output.compile:
                    encoder.network.compile()
                self.compute[output.name] = encoder
            else:
                autoencoder = load_autoencoder(output.model, output.precision).to(self.device)
                if output.compile:
                    autoencoder.compile_networks()
                self.compute[output.name] = _moments_of(autoencoder, output.flips)

    @unit_call
    def __call__(self, unit: Decoded) -> Extracted:
        """Publish the unit's shard in every output that lacks it."""
        started = time.perf_counter()
        for name in unit["wanted"]:
            self._publish(self.outputs[name], unit)
        return {
            "wanted": list(unit["wanted"]),
            "bad": len(unit["bad"]),
            "images": len(unit["ids"]) + len(unit["bad"]),
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(),
            "reader_peak_memory_bytes": unit["peak_memory_bytes"],
        }

    def _publish(self, output: Output, unit: Decoded) -> None:
        from dpt_ray.data.shards import write_features, write_moments

        ids, values = list(unit["ids"]), np.zeros((0, 1), np.float32)
        if ids:
            with self.computing:
                values = self._compute(output, _pixels(unit, output.crop))
            check_finite(output, ids, values)
        write = write_features if output.is_encoder else write_moments
        suffix = ".parquet" if output.is_encoder else ".arrow"

        def payload(path: Path) -> None:
            write(path, ids, values)

        bad = [line.split("\t", 1) for line in unit["bad"]]
        shape = list(values.shape[1:])
        output.out.publish_shard(unit["shard"], suffix, len(ids), payload, bad=bad, shape=shape)

    def _compute(self, output: Output, pixels: np.ndarray) -> np.ndarray:
        """Return the features (n, dim) or moments (n, variants, 2C, H, W) of a unit, computed in batches."""
        import torch

        model, images = self.compute[output.name], torch.from_numpy(pixels.copy())

        def compute(start: int, stop: int) -> torch.Tensor:
            return model(images[start:stop].to(self.device))

        return self.batches[output.name](compute, len(images)).cpu().numpy()


def _pixels(unit: Decoded, crop: Crop) -> np.ndarray:
    """Return the pixels (n, H, W, C) uint8 of a unit for one crop."""
    return cast(Mapping[str, np.ndarray], unit)[repr(crop)]


def _moments_of(autoencoder: Autoencoder, flips: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from images (n, H, W, C) to moments (n, variants, 2C, h, w)."""
    import torch

    variants = (False, True) if flips else (False,)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([autoencoder.encode_moments(batch, flip) for flip in variants], 1)

    return encode


def check_finite(output: Output, ids: list[str], values: np.ndarray) -> None:
    """Raise ValueError, naming an image and the remedy, unless `values` (n, ...) are finite as stored."""
    most = np.finfo(np.float32 if output.is_encoder else np.float16).max
    fits = (np.abs(values) <= most).reshape(len(values), -1).all(axis=1)  # False for NaN
    if fits.all():
        return
    section, what = ("encoder", "features") if output.is_encoder else ("autoencoder", "moments in float16")
    remedy = (
        "the precision is float32 already: check the model's weights, or remove the image"
        if output.precision == "float32"
        else f"set {section}.precision=float32"
    )
    raise ValueError(
        f"the {what} of image {ids[int(fits.argmin())]} are not finite ({(~fits).sum()} of {len(ids)} "
        f"images of this shard); {remedy}"
    )


def _output(task: Task[FeatureSettings]) -> Output:
    is_encoder = "encoder" in task.inputs
    model = task.inputs["encoder" if is_encoder else "autoencoder"]
    settings = task.settings
    return Output(
        task.name,
        task.out,
        model.uri,
        Crop(**model.manifest["crop"]),
        is_encoder,
        settings.precision,
        settings.max_bad_fraction,
        isinstance(settings, MomentSettings) and settings.flips,
        task.compute.compile,
    )


def _wants(output: Output, unit: Unit) -> bool:
    """Return whether the output includes the unit: moments are of training images only."""
    return output.is_encoder or split_of(unit) == "train"


class BadImages:
    """Counts unreadable images, to end the pass as soon as there are certainly too many."""

    def __init__(self, outputs: Sequence[Output], images: Artifact) -> None:
        """Start with the count of earlier passes. Raises ConfigError if it is too high already."""
        self._outputs = {output.name: output for output in outputs}
        self._images = dict.fromkeys(self._outputs, 0)
        self._found = dict.fromkeys(self._outputs, 0)
        for name, output in self._outputs.items():
            published = output.out.shards()
            found = {key: len(shard["bad"]) for key, shard in published.items()}
            for unit in list_units(images):
                if _wants(output, unit):
                    self._images[name] += unit["rows"]
                    self._found[name] += found.get(unit["shard"], 0)
            self._check(name)

    def count(self, result: Extracted) -> None:
        """Add the unreadable images of a unit. Raises ConfigError if there are too many."""
        for name in result["wanted"] if result["bad"] else ():
            self._found[name] += result["bad"]
            self._check(name)

    def _check(self, name: str) -> None:
        output, images = self._outputs[name], self._images[name]
        if self._found[name] > output.max_bad_fraction * images:
            bad = [entry for shard in output.out.shards().values() for entry in shard["bad"]]
            _quarantine(output, bad, images, "at least ")


def _collect(output: Output, images: Artifact, facts: Facts) -> Facts:
    """Return the facts of a complete output. Raises ConfigError if too many images are unreadable."""
    published = output.out.shards()
    shards = [published[unit["shard"]] for unit in list_units(images) if _wants(output, unit)]
    bad = [entry for shard in shards for entry in shard["bad"]]
    rows = sum(shard["rows"] for shard in shards)
    _quarantine(output, bad, rows + len(bad))
    return {
        **facts,
        "rows": rows,
        "shape": next((shard["shape"] for shard in shards if shard["rows"]), []),
        "shards": shards,
        "quarantined": len(bad),
        "bytes": sum(shard["bytes"] for shard in shards),
    }


def _quarantine(output: Output, bad: list[list[str]], images: int, so_far: str = "") -> None:
    """Publish (id, reason) of the unreadable images. Raises ConfigError above `max_bad_fraction`."""
    columns = list(zip(*bad, strict=True)) or [(), ()]
    table = pa.table([pa.array(column, pa.string()) for column in columns], ["id", "reason"])
    with output.out.writing(QUARANTINE) as path:
        pq.write_table(table, path)
    if len(bad) > output.max_bad_fraction * images:
        first = "; ".join(f"{identifier} ({reason})" for identifier, reason in bad[:NAMED])
        more = len(bad) - NAMED
        rest = f"{more} more are" if more > 1 else "1 more is" if more == 1 else "all are"
        raise ConfigError(
            f"data.max_bad_fraction: {output.max_bad_fraction:g}, but {so_far}{len(bad)} of {images} images "
            f"cannot be read: {first}; {'it is' if len(bad) == 1 else rest} in "
            f"{output.out.file_uri(QUARANTINE)}; repair or remove them, or raise it"
        )
