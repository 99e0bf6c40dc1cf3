"""A store with a handful of hand-made latents: all that a denoiser is trained on, without a run before it."""

import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from dpt_ray.config import load_config
from dpt_ray.data.crops import Crop
from dpt_ray.data.shards import write_features, write_moments
from dpt_ray.engine.node import Task
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.denoiser import Denoiser
from dpt_ray.store.artifact import Artifact, Store
from tests.helpers.paths import DIGITS
from tests.helpers.toy import task_of

ROWS, CLASSES, DIM = 40, 4, 6
SMALL = (
    "data.image_size=4",
    "diffusion.model={patch_size: 2, dim: 16, depth: 2, heads: 2, modulation: true}",
    "pretrain.contrast_group=32",  # half a batch: two workers can share it
    "diffusion.steps=12",
    "diffusion.batch_size=16",
    "diffusion.checkpoint_every=4",
    "diffusion.log_every=2",
    "compute.train_workers=0",
)


@dataclass(frozen=True)
class Latents:
    """A store in which all that a denoiser is trained on is published."""

    store: Store

    def artifact(self, name: str) -> Artifact:
        """What a run would have made before."""
        return self.store.artifact(name, "made-by-hand")

    def task(self, *overrides: str) -> Task:
        config = load_config(DIGITS, [*SMALL, *overrides])
        node = flow(config)["denoiser"]
        inputs = {key: self.artifact(source.name) for key, source in node.inputs.items()}
        return task_of(node, self.store, config.compute, inputs)

    def make(self, *overrides: str) -> Task:
        """Trains, and publishes as a run does."""
        task = self.task(*overrides)
        facts = Denoiser.make(task)
        node = task.node
        about = {"settings": dict(node.hashed), "inputs": node.references, "version": node.version}
        task.out.publish(facts | about)
        return task

    def elsewhere(self) -> "Latents":
        """A copy of the store that is not on this machine's disk."""
        copy = Latents(Store(f"memory://{uuid.uuid4().hex}"))
        fs, root = fsspec.core.url_to_fs(copy.store.uri)
        fs.put(f"{self.store.uri}/store", f"{root}/store", recursive=True)
        return copy

    def label(self, values: list[int], ids: list[str] | None = None) -> None:
        """Publishes pseudo-labels; the confidence falls from 1 by 1/100 a row."""
        ids = ids or [f"image-{row}" for row in range(len(values))]
        confidence = pa.array(1 - np.arange(len(values)) / 100, pa.float32())
        table = pa.table({"id": ids, "label": pa.array(values, pa.int32()), "confidence": confidence})
        out = self.artifact("pseudo_labels")
        out.publish_files(lambda folder: pq.write_table(table, folder / "pseudo_labels.parquet"))

    def encode(self, features: np.ndarray, ids: list[str]) -> None:
        """Publishes an encoder and the features (n, DIM) of images."""
        from dpt_ray.models.conv import SmallConvNet
        from dpt_ray.models.encoder import Encoder, save_encoder
        from dpt_ray.models.own_networks import conv_spec

        crop = Crop("adm", 4)
        network = SmallConvNet(1, 8, DIM, torch.Generator().manual_seed(0))
        encoder, out = self.artifact("encoder"), self.artifact("features")
        if out.exists(""):
            out.fs.rm(out.path(""), recursive=True)
        built = Encoder(network, conv_spec(network, crop))
        encoder.publish_files(lambda folder: save_encoder(folder, built))
        encoder.publish({"crop": asdict(crop)})
        shard = out.publish_shard("a", ".parquet", len(ids), lambda path: write_features(path, ids, features))
        out.publish({"shards": [shard]})


def make_latents(folder: Path) -> Latents:
    """Moments, an identity autoencoder, labels row % CLASSES, an encoder and the features it might give."""
    torch.set_num_threads(1)
    made = Latents(Store(str(folder)))
    index, moments, autoencoder = (made.artifact(name) for name in ("index", "moments", "autoencoder"))
    index.write_json("classes.json", [f"class-{k}" for k in range(CLASSES)])
    index.publish({"classes": CLASSES})
    autoencoder.publish_files(lambda folder: _identity(folder))
    autoencoder.publish({"latent_shape": [1, 4, 4], "scale": 1.0})
    values = np.random.default_rng(0).normal(size=(ROWS, 1, 2, 4, 4)).astype(np.float16)
    values[:, :, 1] = -30
    ids = [f"image-{row}" for row in range(ROWS)]
    shard = moments.publish_shard("a", ".arrow", ROWS, lambda path: write_moments(path, ids, values))
    moments.publish({"shape": [1, 2, 4, 4], "shards": [shard]})
    made.label([row % CLASSES for row in range(ROWS)])
    made.encode(np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32), ids)
    return made


def _identity(folder: Path) -> None:
    from dpt_ray.models.autoencoder import open_autoencoder

    open_autoencoder("identity", None, channels=1, size=4).save(folder)


def weights(task):
    return load_file(task.out.path("model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
