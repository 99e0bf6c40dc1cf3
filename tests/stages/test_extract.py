"""Images that cannot be read: how many a pass bears, and what is told of them."""

from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.crops import Crop
from dpt_ray.engine.progress import Display
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run import run
from dpt_ray.stages.extract import BadImages, Output
from dpt_ray.store.artifact import Artifact, Store
from tests.helpers.paths import DIGITS
from tests.helpers.runs import make

ROWS = 100  # of a unit


class Recorder(Display):
    """A display that keeps what it is told of progress."""

    @contextmanager
    def step(self, number, total, name, left=None):
        self.told = []
        yield lambda *numbers: self.told.append(numbers)


def write_shard(out, key, bad):
    out.publish_shard(
        key,
        ".parquet",
        ROWS - bad,
        lambda path: path.touch(),
        bad=[[f"{key}-{i}", "empty"] for i in range(bad)],
    )
    return {"wanted": ["features"], "bad": bad}


@pytest.fixture
def images(tmp_path):
    """An artifact of ten units of images."""
    images = Artifact(str(tmp_path / "images"))
    shards = [{"shard": f"train-{number}", "split": "train", "rows": ROWS} for number in range(10)]
    images.publish({"shards": shards})
    return images


def output(tmp_path, fraction):
    out = Artifact(str(tmp_path / "features"))
    return Output("features", out, "", Crop("adm", 8), True, "float32", fraction)


def test_a_pass_ends_with_the_unit_that_makes_it_certain(tmp_path, images):
    features = output(tmp_path, 0.01)  # 10 of 1,000
    bad = BadImages([features], images)
    for key, count in (("train-0", 4), ("train-1", 0), ("train-2", 6)):
        bad.count(write_shard(features.out, key, count))
    with pytest.raises(ConfigError) as caught:
        bad.count(write_shard(features.out, "train-3", 1))
    text = str(caught.value)
    assert text.startswith("data.max_bad_fraction: 0.01, but at least 11 of 1000 images cannot be read: ")
    assert "train-0-0 (empty); " in text and "; 6 more are in /" in text and "\n" not in text
    table = pq.read_table(features.out.local_file("quarantine.parquet"))
    assert table["id"].to_pylist()[-1] == "train-3-0" and table.num_rows == 11


def test_those_of_an_earlier_pass_count(tmp_path, images):
    features = output(tmp_path, 0.002)
    write_shard(features.out, "train-5", 2)
    bad = BadImages([features], images)
    result = write_shard(features.out, "train-6", 1)
    with pytest.raises(ConfigError, match=r"at least 3 of 1000 images .*; all are in"):
        bad.count(result)
    with pytest.raises(ConfigError, match="at least 3 of 1000 images"):
        BadImages([features], images)


@pytest.mark.parametrize(
    ("count", "told"), [(1, "it is in"), (5, "all are in"), (6, "1 more is in"), (7, "2 more are in")]
)
def test_those_that_are_not_named_are_counted(tmp_path, images, count, told):
    features = output(tmp_path, 0.0)
    bad = BadImages([features], images)
    with pytest.raises(ConfigError, match=f"; {told} /"):
        bad.count(write_shard(features.out, "train-0", count))


def test_broken_files_end_the_run_by_name(cluster, tmp_path):
    for number in range(600):
        path = tmp_path / "own" / "oak" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number % 256, np.uint8)).save(path)
        if number % 3 == 0:
            path.write_bytes(path.read_bytes()[:40])
    own = ("data.source=folder", f"data.uri={tmp_path / 'own'}", "data.max_bad_fraction=0.1")
    config = load_config(DIGITS, [f"output={tmp_path}/out", *own])
    with pytest.raises(
        ConfigError, match=r"max_bad_fraction: 0\.1, but at least \d+ of 600 .*oak/000"
    ) as caught:
        make(config, "moments")
    assert "\n" not in str(caught.value)
    assert not flow(config)["moments"].artifact(Store(config.output)).published
    more = load_config(DIGITS, [f"output={tmp_path}/other", *own[:2], "data.max_bad_fraction=0.5"])
    display = Recorder(Console(quiet=True))
    run(more, display, ["moments"])
    assert display.told[-1] == (600, 600, "images", {"unreadable": 200})
    assert flow(more)["moments"].artifact(Store(more.output)).manifest["quarantined"] == 200
