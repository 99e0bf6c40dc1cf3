"""Splits as a source names them, and as they are drawn around the label lists."""

import pyarrow.compute as pc
import pytest
from PIL import Image

from dpt_ray.config import ConfigError, load_config
from dpt_ray.config.sections import Data
from dpt_ray.data.fingerprint import fingerprint
from dpt_ray.data.units import read_index
from dpt_ray.pipeline.flow import flow
from dpt_ray.stages.sweep import Sweep, check_choice
from dpt_ray.store.artifact import Store
from tests.helpers.runs import make
from tests.helpers.toy import task_of

CONFIG = """
name: small
output: {folder}/out
data:
  source: folder
  uri: {folder}/images
  image_size: 8
  splits: {{val: test}}
  validation: 6
  keep_in_train: [{folder}/few.txt]
labels: {{file: {folder}/few.txt, format: published}}
pretrain: {{steps: 1, batch_size: 8, contrast_group: 8, learning_rate: 0.1}}
diffusion: {{model: {{dim: 8, depth: 2, heads: 1}}, steps: 1, batch_size: 8, learning_rate: 0.1}}
generate: {{images_per_class: 1}}
retrain: {{images_per_class: 1}}
"""


@pytest.fixture
def config(tmp_path):
    for split, count in (("train", 6), ("val", 2)):
        for wnid in ("n01440764", "n15075141"):
            folder = tmp_path / "images" / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8)).save(folder / f"{wnid}_{split}{number}.JPEG")
    listed = [f"{wnid}_train{number}.JPEG" for wnid in ("n01440764", "n15075141") for number in range(3)]
    (tmp_path / "few.txt").write_text("\n".join(listed) + "\n")
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def index(config, *overrides):
    settings = load_config(config, overrides)
    make(settings, "labels")
    return read_index(flow(settings)["index"].artifact(Store(settings.output)))


def ids(table, split):
    found = table.filter(pc.equal(table["split"], split))["id"].to_pylist()
    return {name.rpartition("_")[2] for name in found}


def test_a_split_is_what_the_configuration_says_and_the_listed_images_stay_in_train(config):
    table = index(config)
    assert ids(table, "test") == {"val0", "val1"}
    assert ids(table, "validation") == {"train3", "train4", "train5"}  # all 6 that no list names
    assert ids(table, "train") == {"train0", "train1", "train2"}


def test_without_the_list_a_listed_image_may_be_drawn_and_is_then_told(config):
    with pytest.raises(ConfigError, match="is in the validation split"):
        index(config, "data.keep_in_train=[]", "data.validation=11")


def test_a_list_to_keep_counts_by_its_content(config):
    copy = config.parent / "copy.txt"
    copy.write_text((config.parent / "few.txt").read_text())

    def digest(*overrides):
        return flow(load_config(config, overrides))["index"].digest

    other = f"data.keep_in_train=[{copy}]"
    assert digest(other) == digest()
    copy.write_text("n01440764_train0.JPEG\n")
    assert digest(other) != digest()


def test_a_manifest_counts_by_its_content(config):
    manifest = config.parent / "images.csv"

    def digest():
        overrides = ["data.source=manifest", f"data.uri={manifest}"]
        return flow(load_config(config, overrides))["index"].digest

    manifest.write_text("uri,label\na.png,cat\nb.png,dog\n")
    before = digest()
    manifest.touch()
    assert digest() == before
    manifest.write_text("uri,label\na.png,dog\nb.png,cat\n")  # corrected: no byte more or less
    assert digest() != before


@pytest.mark.parametrize(
    ("source", "name"),
    [("tar", "a.tar"), ("tar", "folder/a.tar"), ("manifest", "a.csv"), ("manifest", "folder/a.csv")],
)
def test_a_file_on_an_object_store_that_is_written_again_is_another(s3_bucket, source, name):
    root, fs = s3_bucket
    uri = root if source == "tar" and "/" in name else f"{root}/{name}"
    settings = Data(source=source, uri=uri)

    def written(content):
        fs.pipe_file(f"{root}/{name}", content)
        return fingerprint(settings)

    prints = [written(content) for content in (b"cat,dog", b"dog,cat", b"cat,dog")]
    assert prints[0] == prints[2] != prints[1]


def test_images_on_an_object_store_are_listed_and_not_read(s3_bucket, monkeypatch):
    root, fs = s3_bucket
    fs.pipe_file(f"{root}/cat/a.png", b"123")
    monkeypatch.setattr(type(fs), "_open", None)
    monkeypatch.setattr(type(fs), "_cat_file", None)
    monkeypatch.setattr(type(fs), "_get_file", None)
    assert len(fingerprint(Data(source="folder", uri=root))) == 16


TWO_SETTINGS = ("data.validation=0", "sweep.images_per_class=[1]", "sweep.l2=[0.1, 1.0]")


def test_nothing_is_chosen_without_validation_images_also_where_the_labels_are_there_already(config):
    index(config, "data.validation=0")
    settings = load_config(config, TWO_SETTINGS)
    store, nodes = Store(settings.output), flow(settings)
    assert nodes["labels"].artifact(store).published
    with pytest.raises(ConfigError, match=r"^sweep: 2 settings but no labelled valid.*data\.validation"):
        make(settings)
    assert {stage for stage, _, _ in store.all_artifacts()} == {"index", "labels"}

    node = nodes["sweep"]
    with pytest.raises(ConfigError, match="2 settings but no labelled validation images"):
        Sweep.make(task_of(node, store, settings.compute))


def test_a_sweep_without_validation_images_is_refused_before_more_than_the_index_is_made(config):
    settings = load_config(config, TWO_SETTINGS)
    with pytest.raises(ConfigError, match="no labelled validation images"):
        make(settings, "sweep")
    assert {stage for stage, _, _ in Store(settings.output).all_artifacts()} == {"index"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.validation=0"],
        ["data.validation=0", "sweep.images_per_class=[1]"],
        ["sweep.images_per_class=[1]", "sweep.l2=[0.1, 1.0]"],
    ],
)
def test_one_setting_needs_no_validation_images_and_several_are_chosen_on_them(config, overrides):
    index(config, *overrides)
    settings = load_config(config, overrides)
    nodes = flow(settings)
    check_choice(nodes["sweep"], nodes["index"].artifact(Store(settings.output)))


def test_one_setting_with_several_seeds_needs_validation_images_for_its_error_bar(config):
    overrides = ["data.validation=0", "sweep.images_per_class=[1]", "sweep.seeds=2"]
    index(config, *overrides)
    settings = load_config(config, overrides)
    nodes = flow(settings)
    with pytest.raises(ConfigError, match=r"^sweep: 2 trials but no labelled validation images"):
        check_choice(nodes["sweep"], nodes["index"].artifact(Store(settings.output)))
