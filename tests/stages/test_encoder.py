"""What an encoder's training holds in memory, and what its network sees of it."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from dpt_ray.config import load_config
from dpt_ray.data import pixels as data_pixels
from dpt_ray.models.encoder import load_encoder
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages import encoder as pretrain
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.runs import make

UNITS, ROWS, SIZE = 8, 500, 32


def test_the_training_images_are_held_once_and_as_bytes(monkeypatch):
    def iterate_pixels(images, how, mode, split):
        """Units of a colour each, and one image in each that cannot be read."""
        for unit in range(UNITS):
            yield (
                [f"{unit}-{row}" for row in range(1, ROWS)],
                np.full((ROWS - 1, SIZE, SIZE, 3), unit, np.uint8),
            )

    index = pa.table({"id": [f"{u}-{r}" for u in range(UNITS) for r in range(ROWS)]})
    index = index.append_column("label", pa.array([r % 3 or None for _ in range(UNITS) for r in range(ROWS)]))
    monkeypatch.setattr(data_pixels, "iterate_pixels", iterate_pixels)
    monkeypatch.setattr(pretrain, "read_index", lambda artifact, columns: index)
    units = [{"split": split, "rows": ROWS} for split in ["train"] * UNITS + ["test"]]
    task = SimpleNamespace(
        inputs={"index": SimpleNamespace(manifest={"mode": "RGB", "units": units})},
        settings=SimpleNamespace(image_size=SIZE, objective="simclr"),
    )
    tracemalloc.start()
    pixels, labels = pretrain._load(task)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = UNITS * ROWS * SIZE**2 * 3
    assert peak < 1.5 * whole
    assert pixels.nbytes + 3 * UNITS * SIZE**2 == whole
    assert pixels[:, 0, 0, 0].tolist() == [unit for unit in range(UNITS) for _ in range(ROWS - 1)]
    assert labels.tolist() == [row % 3 or -1 for _ in range(UNITS) for row in range(1, ROWS)]


@pytest.mark.parametrize("objective", ["simclr", "msn"])
@pytest.mark.parametrize("network", [("resnet", None), ("test_vit", 4)], ids=["resnet", "vit"])
def test_every_network_trains_by_every_objective_and_gives_features(tmp_path, objective, network):
    name, patch = network
    changes = {"objective": objective, "network": name, "patch_size": patch, "width": 8, "dim": 16}
    changes |= {"augmentation": "photographs", "steps": 2, "prototypes": 8, "warmup_steps": 0}
    overrides = [f"pretrain.{key}={'' if value is None else value}" for key, value in changes.items()]
    config = load_config(
        DIGITS, [*overrides, "data.mode=RGB", "compute={train_workers: 0}", f"output={tmp_path}"]
    )
    make(config, "encoder")
    folder = flow(config)["encoder"].artifact(Store(config.output))
    encoder = load_encoder(folder.uri)
    features = encoder(torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8))
    assert features.shape == (3, {"resnet": 64, "test_vit": 64}[name])
    assert features.isfinite().all() and not torch.equal(features[0], features[1])


def test_the_network_sees_colours_between_minus_one_and_one():
    pixels = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)  # one pixel of three colours
    found = pretrain._to_network(pixels)
    assert found.shape == (1, 3, 1, 1)
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 1.0, -0.6]))
