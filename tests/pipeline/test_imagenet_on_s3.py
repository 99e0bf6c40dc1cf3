"""The whole flow on a small ImageNet, all of it on an S3-compatible server.

Classes named by WordNet ids, JPEGs of all sizes and every odd kind in tar shards, weights in the
published formats: as with ImageNet itself, only smaller.
"""

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dpt_ray.config import ConfigError, load_config
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store
from tests.helpers.images import encoded, tar_of
from tests.helpers.object_store import object_store
from tests.helpers.paths import GOLDEN
from tests.helpers.runs import make

CLASSES = ["n01440764", "n01443537", "n02085620", "n03000684", "n04235860", "n15075141"]
COLOURS = np.array(
    [(200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40), (200, 40, 200), (30, 30, 30)]
)
TRAIN, VAL = 15, 5  # images of each class, the odd ones apart
CONFIG = """
name: small
output: s3://dpt/out
data: {source: tar, uri: s3://dpt/imagenet, image_size: 32, splits: {val: test}, max_bad_fraction: 0.1}
labels: {file: s3://dpt/2imgs_class.txt, format: published}
encoder: {kind: msn, weights: s3://dpt/vit_300ep.pth.tar}
autoencoder: {kind: kl, weights: s3://dpt/autoencoder_kl.pth}
diffusion:
  model: {patch_size: 4, dim: 16, depth: 2, heads: 2}
  steps: 4
  batch_size: 8
  learning_rate: 2e-4
  checkpoint_every: 4
generate: {images_per_class: 4, indices_per_shard: 2, nfe: 3, guidance: 1.4}
retrain: {images_per_class: 4}
evaluate: {controls: false}
compute: {cpus: 2, train_workers: 0, actors: 1, batch_size: 32}
"""


def picture(random, label):
    """A noisy patch of the class's colour, of any size and aspect."""
    height, width = random.integers(33, 90, 2)
    noise = random.integers(-30, 31, (height, width, 3))
    return Image.fromarray(np.clip(COLOURS[label] + noise, 0, 255).astype(np.uint8))


def odd_images(random):
    """{what it is: (class, bytes)} of what PIL reads but a plain RGB reader would not."""
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    deep = Image.fromarray(random.integers(0, 65536, (40, 50)).astype(np.uint16))
    alpha = picture(random, 5)
    alpha.putalpha(100)
    return {
        "cmyk": (0, encoded(picture(random, 0).convert("CMYK"), "JPEG")),
        "grey": (1, encoded(picture(random, 1).convert("L"), "JPEG")),
        "png": (2, encoded(picture(random, 2), "PNG")),
        "exif": (3, encoded(picture(random, 3), "JPEG", exif=exif)),
        "deep": (4, encoded(deep, "PNG")),
        "alpha": (5, encoded(alpha, "PNG")),
        "palette": (0, encoded(picture(random, 0).convert("P"), "GIF")),
    }


def unreadable_images(random):
    """{what it is: (class, bytes)} of what nobody can read."""
    whole = encoded(picture(random, 1), "JPEG")
    return {
        "truncated": (1, whole[: len(whole) // 2]),
        "empty": (2, b""),
        "text": (3, b"<html>404</html>"),
    }


UNREADABLE = {"n01443537_truncated", "n02085620_empty", "n03000684_text"}


def tar_shard(images):
    """A WebDataset tar of (key, class, bytes)."""
    members = {}
    for key, label, data in images:
        members |= {f"{key}.JPEG": data, f"{key}.cls": CLASSES[label].encode()}
    return tar_of(members)


def msn_checkpoint():
    """A tiny network under the published names: a prefix, and a projection head that is not used."""
    from dpt_ray.models.msn import MsnVit

    torch.manual_seed(0)
    network = MsnVit(32, 8, 3, dim=64, depth=2, heads=1)
    weights = {name: torch.randn_like(value) * 0.3 for name, value in network.state_dict().items()}
    weights |= {"fc.fc1.weight": torch.zeros(8, 64), "fc.fc1.bias": torch.zeros(8)}
    buffer = io.BytesIO()
    content = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"target_encoder": content, "epoch": 300}, buffer)
    return buffer.getvalue()


def bucket_content():
    """{path in the bucket: bytes} of the images, the label list and the weights."""
    random = np.random.default_rng(0)
    numbered = [(f"{wnid}_{n}", c) for n in range(TRAIN + VAL) for c, wnid in enumerate(CLASSES)]
    images = [(key, label, encoded(picture(random, label), "JPEG")) for key, label in numbered]
    train, val = images[: TRAIN * len(CLASSES)], images[TRAIN * len(CLASSES) :]
    odd = odd_images(random) | unreadable_images(random)
    train += [(f"{CLASSES[label]}_{kind}", label, data) for kind, (label, data) in odd.items()]
    few = [key for key, _ in numbered[: 2 * len(CLASSES)]]
    listed = {"2imgs_class.txt": [*few, "n01443537_truncated"], "readable.txt": few}
    listed["unreadable.txt"] = ["n01443537_truncated", *(key for key in few if "n01443537" not in key)]
    return {
        "imagenet/train-000000.tar": tar_shard(train[::2]),
        "imagenet/train-000001.tar": tar_shard(train[1::2]),
        "imagenet/val-000000.tar": tar_shard(val),
        **{name: "".join(f"{key}.JPEG\n" for key in keys).encode() for name, keys in listed.items()},
        "vit_300ep.pth.tar": msn_checkpoint(),
        "autoencoder_kl.pth": (GOLDEN / "autoencoder_kl.pth").read_bytes(),
    }


@pytest.fixture(scope="module")
def s3():
    """The environment in which s3://dpt/ holds the small ImageNet."""
    with object_store() as environment:
        import s3fs

        fs = s3fs.S3FileSystem()
        fs.mkdir("dpt")
        for path, data in bucket_content().items():
            fs.pipe_file(f"dpt/{path}", data)
        yield environment


@dataclass(frozen=True)
class SmallRun:
    """The run on the small ImageNet."""

    path: Path

    @property
    def nodes(self):
        return flow(load_config(self.path))

    def artifact(self, name):
        return self.nodes[name].artifact(Store("s3://dpt/out"))

    def make(self, target, *overrides):
        """Makes the target with this process as the driver; what was made."""
        return make(load_config(self.path, overrides), target)


@pytest.fixture(scope="module")
def finished(s3, tmp_path_factory):
    """A whole run by `dpt`, with a cluster of its own whose workers know where the server is."""
    folder = tmp_path_factory.mktemp("small")
    path = folder / "small.yaml"
    path.write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "dpt_ray.cli", "run", str(path)],
        env=os.environ | s3 | {"RAY_ADDRESS": "", "TMPDIR": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr
    assert "report: s3://dpt/out/store/report/" in done.stdout
    return SmallRun(path)


def test_every_stage_is_published_on_the_object_store(finished):
    assert [name for name in finished.nodes if not finished.artifact(name).published] == []
    rows = {
        name: finished.artifact(name).manifest["rows"] for name in ("index", "labels", "features", "moments")
    }
    assert rows == {"index": 130, "labels": 13, "features": 127, "moments": 97}
    assert finished.artifact("pseudo_labels").manifest["rows"] == 127
    assert (
        finished.artifact("samples").manifest["rows"]
        == finished.artifact("sample_features").manifest["rows"]
        == 24
    )
    assert finished.artifact("moments").manifest["shape"] == [2, 8, 16, 16]  # the image and its mirror image


def test_unreadable_images_are_in_the_quarantine_with_the_reason(finished):
    features = finished.artifact("features")
    table = pq.read_table(features.local_file("quarantine.parquet"))
    assert table.column_names == ["id", "reason"]
    reasons = dict(zip(*table.to_pydict().values(), strict=True))
    assert reasons.keys() == UNREADABLE
    assert reasons["n02085620_empty"] == "empty: zero bytes"
    assert "truncated" in reasons["n01443537_truncated"]
    assert reasons["n03000684_text"].startswith("not an image")
    assert features.manifest["quarantined"] == 3
    assert "3 unreadable images were set aside" in report(finished)


def test_a_labelled_image_that_cannot_be_read_is_left_out_and_counted(finished):
    classifier = finished.artifact("classifier")
    assert (classifier.manifest["labelled"], classifier.manifest["unreadable_labels"]) == (12, 1)
    assert "1 of the 13 labelled images cannot be read" in report(finished)
    readable = ("name=readable", "labels.file=s3://dpt/readable.txt")
    assert finished.make("classifier", *readable) == ["labels", "classifier"]
    other = flow(load_config(finished.path, readable))["classifier"].artifact(Store("s3://dpt/out"))
    assert other.manifest["unreadable_labels"] == 0
    assert other.read_bytes("model.safetensors") == classifier.read_bytes("model.safetensors")


def test_a_class_that_loses_all_its_labels_ends_the_run_by_name(finished):
    with pytest.raises(ConfigError) as caught:
        finished.make("classifier", "name=unreadable", "labels.file=s3://dpt/unreadable.txt")
    text = str(caught.value)
    assert text.startswith("labels: no labelled image of class n01443537 can be read (1 such classes; ")
    assert "n01443537_truncated" in text and "label other images" in text and "\n" not in text


def report(finished):
    return finished.artifact("report").read_bytes("report.html").decode()


def test_odd_images_have_the_features_of_what_pil_makes_of_them(finished):
    """Against torchvision's transforms, the published evaluation's own."""
    from torchvision.transforms import v2

    from dpt_ray.data.shards import read_features
    from dpt_ray.models.encoder import load_encoder

    ids, features = read_features(finished.artifact("features"))
    found = dict(zip(ids.to_pylist(), features, strict=True))
    encoder = load_encoder(finished.artifact("encoder").uri)
    cut = v2.Compose([v2.Resize(37), v2.CenterCrop(32)])
    random = np.random.default_rng(0)
    for _ in range((TRAIN + VAL) * len(CLASSES)):
        picture(random, 0)
    for kind, (label, data) in odd_images(random).items():
        image = cut(Image.open(io.BytesIO(data)).convert("RGB"))
        expected = encoder(torch.from_numpy(np.asarray(image).copy())[None])[0].numpy()
        np.testing.assert_allclose(
            found[f"{CLASSES[label]}_{kind}"], expected, rtol=1e-3, atol=1e-3, err_msg=kind
        )


def test_the_evaluation_counts_the_50k_as_test_images_and_needs_no_validation(finished):
    evaluation = finished.artifact("evaluation").read_json("evaluation.json")
    assert evaluation["n_labels"] == 12
    probe, stage3 = evaluation["accuracy"]
    assert probe["n_test"] == stage3["n_test"] == VAL * len(CLASSES)
    assert probe["n_validation"] == 0
    assert probe["test"] > 0.5  # colours are easy, whatever the weights
    assert evaluation["gain"]["improved"] == stage3["method"]


def test_the_run_folder_points_at_the_results(finished):
    import s3fs

    fs = s3fs.S3FileSystem()
    names = {path.rpartition("/")[2] for path in fs.ls("dpt/out/runs/small")}
    shown = {"report.html", "pseudo_labels.parquet", "probe.json", "classifier", "denoiser", "samples"}
    assert names == {
        "config.yaml",
        "artifacts.json",
        *(f"{name}.json" for name in shown),
        "evaluation.json.json",
    }


def test_the_same_run_again_makes_nothing(finished):
    assert finished.make("report") == []


def test_too_many_unreadable_images_end_the_run_by_name(finished):
    features = finished.artifact("features")
    manifest = features.manifest
    features.fs.rm_file(features.path("manifest.json"))  # the last step is to be taken again
    try:
        with pytest.raises(ConfigError) as caught:
            finished.make("features", "data.max_bad_fraction=")
    finally:
        assert not features.published
        features.publish(manifest)
    text = str(caught.value)
    assert text.startswith("data.max_bad_fraction: 0.001, but 3 of 130 images cannot be read: ")
    assert all(identifier in text for identifier in UNREADABLE)
    assert "n02085620_empty (empty: zero bytes)" in text
    assert "\n" not in text
