"""Places of images: one text for each, however it is written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpt_ray.config import load_config
from dpt_ray.data.listing import canonical
from dpt_ray.pipeline.flow import flow


@pytest.mark.parametrize("written", ["pictures", "pictures/", "./pictures", "~/pictures"])
def test_a_local_folder_is_its_absolute_path(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert canonical(written) == str(tmp_path / "pictures")
    assert canonical(f"file://{tmp_path}/pictures") == str(tmp_path / "pictures")


@pytest.mark.parametrize(
    "uri", ["s3://bucket/pictures", "hf://datasets/name/set", "zip://a::s3://bucket/b.zip"]
)
def test_a_place_elsewhere_stays_what_it_is(uri):
    assert canonical(uri) == canonical(f"{uri}/") == uri


def index_of(uri):
    data = f"data={{source: folder, uri: {uri}, mode: RGB, image_size: 16}}"
    config = load_config(Path(__file__).parents[2] / "configs/digits.yaml", [data])
    return flow(config)["index"].reference


def test_the_same_folder_is_the_same_index_and_one_of_the_same_name_elsewhere_another(tmp_path, monkeypatch):
    for place in ("here", "there"):
        (tmp_path / place / "pictures" / "oak").mkdir(parents=True)
        image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
        image.save(tmp_path / place / "pictures" / "oak" / "1.png")
    found = {}
    for place in ("here", "there"):
        monkeypatch.chdir(tmp_path / place)
        written = ("pictures", "pictures/", "./pictures", str(tmp_path / place / "pictures"))
        found[place] = {index_of(uri) for uri in written}
    assert len(found["here"]) == len(found["there"]) == 1 and found["here"] != found["there"]
