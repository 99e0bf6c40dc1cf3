"""The published photograph sets that configurations name, read from copies where there are some.

`DPT_RAY_DATA` is their folder: cifar10, tiny_imagenet_32 and imagenette_128 with the Parquet files in the
layout of the Hugging Face hub.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from dpt_ray.config import load_config
from dpt_ray.data.crops import Crop
from dpt_ray.data.decoded import iterate_pixels
from dpt_ray.data.units import read_index
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store
from tests.helpers.paths import CONFIGS, ROOT
from tests.helpers.runs import make

FOLDER = Path(os.environ.get("DPT_RAY_DATA", ROOT.parent / "shared" / "data"))
SETS = {
    "cifar10": ("cifar10", {"train": 49_900, "validation": 100, "test": 10_000}, "airplane"),
    "tiny_imagenet_32": (
        "tiny_imagenet_32",
        {"train": 98_000, "validation": 2000, "test": 10_000},
        "n01443537",
    ),
    "imagenette": ("imagenette_128", {"train": 9369, "validation": 100, "test": 3925}, "n01440764"),
}


@pytest.mark.parametrize("name", SETS)
def test_a_published_set_is_read_with_its_labels_and_its_own_test_split(tmp_path, name):
    folder, counts, first = SETS[name]
    if not (FOLDER / folder).exists():
        pytest.skip(f"no {folder} in {FOLDER}")
    config = load_config(CONFIGS / f"{name}.yaml", [f"data.uri={FOLDER / folder}", f"output={tmp_path}"])
    make(config, "labels")
    index = flow(config)["index"].artifact(Store(config.output))
    table = read_index(index, ["split", "label"])
    assert Counter(table["split"].to_pylist()) == counts
    classes = index.read_json("classes.json")
    assert classes[0] == first
    assert set(table["label"].to_pylist()) == set(range(len(classes)))
    ids, pixels = next(iterate_pixels(index, Crop("adm", config.data.image_size), "RGB", "test"))
    assert len(ids) == 256 and pixels.shape == (256, config.data.image_size, config.data.image_size, 3)
