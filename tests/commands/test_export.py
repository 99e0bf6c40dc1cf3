"""A run's generated images as WebDataset, ImageFolder and npz, read back by other libraries."""

import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

from dpt_ray.commands import export
from dpt_ray.commands.export import export_samples
from dpt_ray.config import Config, ConfigError, load_config
from dpt_ray.data import export as formats
from dpt_ray.data.shards import encode_png, write_images
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS

CLASSES = ["two", "one", "zero"]  # in another order than the sorted one
PER_CLASS = 5
PER_SHARD = 4  # so that the second shard reaches three indices too far


def pixels(label: int, index: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng([label, index]).integers(0, 256, (6, 6, channels), np.uint8)


def name(label: int, index: int) -> str:
    return f"gen-{label:05d}-{index:07d}"


# The images that belong to the run, in the order of its shards.
ITEMS = [(label, index) for index in range(PER_CLASS) for label in range(len(CLASSES))]


def publish_samples(
    root: Path, overrides: tuple[str, ...] = (), classes: list[str] = CLASSES, channels: int = 3
) -> Config:
    """A run of which only the index's class list and the generated images are there."""
    counts = [f"{key}={PER_CLASS}" for key in ("generate.images_per_class", "retrain.images_per_class")]
    config = load_config(
        DIGITS, [*counts, f"sweep.images_per_class=[{PER_CLASS}]", f"output={root}/output", *overrides]
    )
    nodes, store = flow(config), Store(config.output)
    index, samples = (nodes[key].artifact(store) for key in ("index", "samples"))
    index.write_json("classes.json", classes)
    index.publish({"mode": "RGB"})
    shards = []
    for first in (0, PER_SHARD):
        items = [(label, i) for i in range(first, first + PER_SHARD) for label in range(len(CLASSES))]
        columns = {
            "id": [name(*item) for item in items],
            "class": pa.array([label for label, _ in items], pa.int32()),
            "index": pa.array([i for _, i in items], pa.int64()),
        }
        images = [pixels(*item, channels) for item in items]

        write = partial(write_images, images=images, columns=columns)
        shards.append(samples.publish_shard(f"i{first}", ".parquet", len(items), write))
    samples.publish({"shards": shards})
    return config


def test_npz_holds_every_image_of_the_run_with_its_class(tmp_path: Path) -> None:
    config = publish_samples(tmp_path)
    assert export_samples(config, "npz", tmp_path / "out" / "samples.npz") == len(ITEMS)
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(images, np.stack([pixels(*item) for item in ITEMS]))
    np.testing.assert_array_equal(labels, [label for label, _ in ITEMS])


def test_npz_of_greyscale_images_has_three_equal_channels(tmp_path: Path) -> None:
    config = publish_samples(tmp_path, channels=1)
    export_samples(config, "npz", tmp_path / "samples.npz")
    images = np.load(tmp_path / "samples.npz", allow_pickle=False)["arr_0"]
    grey = np.stack([pixels(*item, channels=1) for item in ITEMS])
    np.testing.assert_array_equal(images, np.repeat(grey, 3, axis=-1))


def test_torchvision_reads_the_image_folder(tmp_path: Path) -> None:
    config = publish_samples(tmp_path)
    assert export_samples(config, "imagefolder", tmp_path / "out") == len(ITEMS)
    folder = ImageFolder(tmp_path / "out")
    found = {
        (folder.classes[label], Path(path).stem): np.array(image)
        for (path, _), (image, label) in zip(folder.samples, folder, strict=True)
    }
    assert found.keys() == {(CLASSES[label], name(label, index)) for label, index in ITEMS}
    for label, index in ITEMS:
        np.testing.assert_array_equal(found[CLASSES[label], name(label, index)], pixels(label, index))


def test_greyscale_images_stay_greyscale_files(tmp_path: Path) -> None:
    config = publish_samples(tmp_path, channels=1)
    export_samples(config, "imagefolder", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "two" / f"{name(0, 0)}.png").mode == "L"


def test_tar_shards_hold_each_image_beside_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "IMAGES_PER_TAR", 4)
    config = publish_samples(tmp_path)
    assert export_samples(config, "webdataset", tmp_path / "out") == len(ITEMS)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"samples-{n:06d}.tar" for n in range(4)]
    members = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names = tar.getnames()
            assert len(names) in (8, 6)
            members += [(member, tar.extractfile(member).read()) for member in names]  # type: ignore[union-attr]
    expected = [f"{name(*item)}.{kind}" for item in ITEMS for kind in ("png", "cls")]
    assert [member for member, _ in members] == expected
    for (label, index), (_, image), (_, cls) in zip(ITEMS, members[::2], members[1::2], strict=True):
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(image))), pixels(label, index))
        assert cls == str(label).encode()
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == CLASSES


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    config = publish_samples(tmp_path)
    for out in ("a.npz", "b.npz"):
        export_samples(config, "npz", tmp_path / out)
    for out in ("a", "b"):
        export_samples(config, "webdataset", tmp_path / out)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    tar = "samples-000000.tar"
    assert (tmp_path / "a" / tar).read_bytes() == (tmp_path / "b" / tar).read_bytes()


def test_images_of_a_model_without_classes_carry_none(tmp_path: Path) -> None:
    config = publish_samples(tmp_path, ("diffusion.condition=none",))
    for format, out in (("npz", "s.npz"), ("webdataset", "tars"), ("imagefolder", "folder")):
        assert export_samples(config, format, tmp_path / out) == len(ITEMS)
    assert np.load(tmp_path / "s.npz", allow_pickle=False).files == ["arr_0"]
    with tarfile.open(tmp_path / "tars" / "samples-000000.tar") as tar:
        assert tar.getnames() == [f"{name(*item)}.png" for item in ITEMS]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["unlabelled"]
    assert len(ImageFolder(tmp_path / "folder")) == len(ITEMS)


@pytest.mark.parametrize(("format", "out"), [("npz", "out.npz"), ("imagefolder", "out")])
def test_what_exists_is_never_overwritten(tmp_path: Path, format: str, out: str) -> None:
    config = publish_samples(tmp_path)
    (tmp_path / out).write_text("mine")
    with pytest.raises(ConfigError, match=f"{out}' exists; remove it"):
        export_samples(config, format, tmp_path / out)
    assert (tmp_path / out).read_text() == "mine"


@pytest.mark.parametrize(("format", "out"), [("npz", "s.npz"), ("webdataset", "s"), ("imagefolder", "s")])
def test_an_export_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, out: str
) -> None:
    config = publish_samples(tmp_path)
    whole = export.iterate_samples

    def broken(*args: Any) -> Iterator[formats.Sample]:
        yield from islice(whole(*args), 7)
        raise OSError("the disk is full")

    monkeypatch.setattr(export, "iterate_samples", broken)
    with pytest.raises(ConfigError, match="was not written: the disk is full"):
        export_samples(config, format, tmp_path / "exports" / out)
    assert list((tmp_path / "exports").iterdir()) == []


def test_npz_refuses_more_or_fewer_images_than_its_header_says(tmp_path: Path) -> None:
    for count in (1, 3):
        png = encode_png(pixels(0, 0))
        with pytest.raises(ValueError, match=f"expected {count} images, got 2"):
            formats.write_npz(tmp_path / "s.npz", [("a", 0, png), ("b", 1, png)], count)


def test_images_that_are_not_made_yet_are_asked_for(tmp_path: Path) -> None:
    publish_samples(tmp_path)
    more = load_config(DIGITS, [f"output={tmp_path}/output"])  # 128 images per class
    with pytest.raises(ConfigError, match=r"128 images per class .* run `dpt generate CONFIG` first"):
        export_samples(more, "npz", tmp_path / "samples.npz")


def test_bad_requests_name_what_is_allowed(tmp_path: Path) -> None:
    config = publish_samples(tmp_path, classes=["cat", "cat/kitten", "dog"])
    with pytest.raises(ConfigError, match="'zip' is unknown; use one of webdataset, imagefolder, npz"):
        export_samples(config, "zip", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"must end in \.npz"):
        export_samples(config, "npz", tmp_path / "out")
    with pytest.raises(ConfigError, match="'cat/kitten' is no valid folder name"):
        export_samples(config, "imagefolder", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="was not written"):
        export_samples(config, "npz", tmp_path / "file" / "out.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "output"]
