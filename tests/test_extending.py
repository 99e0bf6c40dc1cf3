"""docs/extending.md: each diff applies to the repository, and what it adds works."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.helpers.paths import ROOT

DIFFS = re.findall(
    r"^```diff\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL | re.MULTILINE
)
RUN = """
from rich.console import Console
from dpt_ray.config import load_config
from dpt_ray.config.sections import Compute
from dpt_ray.engine.execute import execute
from dpt_ray.engine.progress import Display
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store

def make(config, *names):
    nodes, store = flow(config), Store("out")
    execute([nodes[name] for name in names], store, config.compute, Display(Console(quiet=True)), {})
    return [nodes[name].artifact(store) for name in names]
"""
EXAMPLES = {
    "source": """
config = load_config("configs/digits.yaml", ["data={source: list, uri: images/list.txt, mode: RGB}"])
[index] = make(config, "index")
assert index.read_json("classes.json") == ["ash", "oak"] and index.manifest["rows"] == 4
""",
    "encoder": """
import torch
from dpt_ray.models.encoder import load_encoder
config = load_config("configs/digits.yaml", ["data.mode=RGB", "encoder={kind: random}", "autoencoder=null"])
[artifact] = make(config, "encoder")
pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
features = load_encoder(artifact.uri)(pixels)
assert features.shape == (3, 64) and not torch.equal(features[0], features[1])
""",
    "learner": """
changes = ["pretrain.steps=2", "pretrain.objective=rotation", "compute={train_workers: 0}"]
[encoder] = make(load_config("configs/digits.yaml", changes), "encoder")
assert encoder.exists("model.safetensors")
""",
    "stage": """
import pyarrow as pa, pyarrow.parquet as pq
config = load_config("configs/digits.yaml")
labels = flow(config)["pseudo_labels"].artifact(Store("out"))
for name in ("index", "labels", "encoder", "features", "classifier"):
    flow(config)[name].artifact(Store("out")).publish({})
with labels.writing("pseudo_labels.parquet") as path:
    pq.write_table(pa.table({"class_name": ["oak", "ash", "oak"]}), path)
labels.publish({})
[counts] = make(config, "class_counts")
assert counts.read_bytes("class_counts.csv") == b"class,images\\noak,2\\nash,1\\n"
""",
}


@pytest.fixture
def copy(tmp_path):
    """The package and its configurations, and four images of two classes."""
    for name in ("dpt_ray", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "images").mkdir()
    lines = []
    for number, label in enumerate(("oak", "ash", "oak", "ash")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        lines.append(f"{number}.png {label}\n")
    (tmp_path / "images" / "list.txt").write_text("".join(lines))
    return tmp_path


def test_the_page_has_an_example_of_each_kind():
    assert len(DIFFS) == len(EXAMPLES)


@pytest.mark.parametrize(("example", "diff"), zip(EXAMPLES, DIFFS, strict=True), ids=EXAMPLES)
def test_an_extension_is_one_file_and_one_entry_and_works(copy, example, diff):
    (copy / "change.diff").write_text(diff)
    applied = subprocess.run(["git", "apply", "change.diff"], cwd=copy, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    assert diff.count("\n--- /dev/null") == 1  # one new file
    ran = subprocess.run(
        [sys.executable, "-c", RUN + EXAMPLES[example]],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
