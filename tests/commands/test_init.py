"""`dpt init`: a configuration for one's own images that is valid and says what was found."""

import numpy as np
import pytest
import yaml
from PIL import Image

from dpt_ray.cluster.session import unused_gpus
from dpt_ray.commands import init as start
from dpt_ray.commands.init import write_config
from dpt_ray.config import ConfigError, load_config
from dpt_ray.config.sections import Compute
from dpt_ray.pipeline import run as runs
from tests.helpers.runs import make, quiet


def draw(path, side=20, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side + 5, 3), 9, np.uint8)).convert(mode).save(path)


@pytest.fixture
def classes(tmp_path):
    """40 images in a folder for each class, 4 of which are on the list."""
    for name in ("rose", "tulip"):
        for number in range(20):
            draw(tmp_path / "my flowers" / name / f"{number}.png")
    rows = [f"{name}/{number},{name}" for name in ("rose", "tulip") for number in range(2)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows]) + "\n")
    return tmp_path


def test_a_folder_for_each_class_gives_a_run_that_passes_its_first_stages(classes):
    path, found = write_config(str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml")
    config = load_config(path, [f"output={classes}/out"])
    assert (config.name, config.data.source, config.data.image_size) == ("my-flowers", "folder", 16)
    assert (config.data.validation, config.data.test) == (3, 3)  # a tenth of the other 36
    assert str(found) == "40 train images as folder; 4 labels of 2 classes; 16 pixels, RGB"
    assert f"`dpt init`: {found}" in path.read_text()
    assert make(config, "labels") == ["index", "labels"]


@pytest.mark.parametrize(("side", "mode"), [(32, "L"), (64, "RGB")])
def test_grey_images_stay_grey_unless_published_weights_want_colour(tmp_path, side, mode):
    for number in range(3):
        draw(tmp_path / "images" / f"{number}.png", side, "L")
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n1,rose\n")
    path, found = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    assert (found.mode, load_config(path).data.mode) == ("L", mode)


def test_without_class_folders_the_list_names_the_classes(tmp_path):
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png", 300, "L")
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    path, _ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    config = load_config(path, [f"output={tmp_path}/out"])
    assert config.data.classes == ("rose", "tulip")
    assert (config.data.image_size, config.data.mode, config.data.test) == (256, "RGB", 0)
    assert (config.encoder.kind, config.autoencoder.kind) == ("msn", "kl")


def test_the_classes_of_the_configuration_are_those_of_the_index(tmp_path):
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png")
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    path, _ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    _, store = runs.run(load_config(path, [f"output={tmp_path}/out"]), quiet(), ["labels"])
    [digest] = store.digests("index")
    assert store.artifact("index", digest).read_json("classes.json") == ["rose", "tulip"]


def test_a_file_that_is_there_is_not_overwritten(classes):
    out = classes / "c.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"c\.yaml' exists; remove it or name another"):
        write_config(str(classes / "my flowers"), str(classes / "labels.csv"), out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("images", "line", "part"),
    [
        ("nowhere", "rose/0,rose", "nowhere does not exist"),
        ("my flowers", "rose/99,rose", "line 2: no image 'rose/99'"),
        ("my flowers", "rose/0,lily", "line 2: unknown class 'lily'"),
        ("my flowers", "rose/0,", "line 2: rose/0 has no label; give one or remove the line"),
        ("my flowers", "rose/0", "line 2: rose/0 has no label; give one or remove the line"),
    ],
)
def test_what_cannot_be_used_is_told_and_nothing_is_written(classes, images, line, part):
    (classes / "labels.csv").write_text(f"id,label\n{line}\n")
    with pytest.raises(ConfigError, match=part) as caught:
        write_config(str(classes / images), str(classes / "labels.csv"), classes / "c.yaml")
    assert "\n" not in str(caught.value)
    assert not (classes / "c.yaml").exists()


def test_the_file_is_yaml_with_the_words_of_the_configuration(classes):
    path, _ = write_config(str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml")
    tree = yaml.safe_load(path.read_text())
    assert list(tree)[:4] == ["name", "output", "data", "labels"]
    assert tree["data"]["keep_in_train"] == [str(classes / "labels.csv")]


@pytest.mark.parametrize(("side", "gpu", "used"), [(20, False, False), (20, True, True), (300, False, True)])
def test_gpus_are_used_for_large_images_and_where_there_are_some(tmp_path, monkeypatch, side, gpu, used):
    monkeypatch.setattr(start, "has_gpu", lambda: gpu)
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png", side)
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    path, _ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    compute = load_config(path).compute
    assert (compute.train_gpus, compute.actor_gpus) == ((True, 1) if used else (False, 0))


def test_a_gpu_is_seen_by_the_file_of_its_driver(tmp_path):
    (tmp_path / "nvidiactl").touch()  # there without a GPU too
    assert not start.has_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert start.has_gpu(tmp_path)


def test_a_run_tells_of_gpus_that_it_leaves_idle():
    idle = "note: the cluster has GPUs (2) that are not used; set "
    assert unused_gpus(Compute(), 0) == ""
    assert unused_gpus(Compute(), 2) == f"{idle}compute.train_gpus=true compute.actor_gpus=1"
    assert unused_gpus(Compute(train_gpus=True), 2) == f"{idle}compute.actor_gpus=1"
    assert unused_gpus(Compute(actor_gpus=0.5, train_workers=0), 2) == ""
    assert unused_gpus(Compute(train_gpus=True, actor_gpus=1), 2) == ""
