"""New images labelled with what a run has learned."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from dpt_ray.commands import predict
from dpt_ray.commands.export import export_model
from dpt_ray.commands.predict import predict_images
from dpt_ray.config import Config, ConfigError, load_config
from dpt_ray.data.crops import Crop
from dpt_ray.evaluation.methods import METHODS
from dpt_ray.learners.linear_classifier import save_classifier
from dpt_ray.models.conv import SmallConvNet
from dpt_ray.models.encoder import Encoder, save_encoder
from dpt_ray.models.own_networks import conv_spec
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run_folder import link
from dpt_ray.store.artifact import Store
from tests.helpers.images import encoded, tar_of
from tests.helpers.paths import DIGITS

CLASSES = ["cat", "dog", "owl"]
SIZE, DIM, TEMPERATURE = 8, 6, 0.25
# Method: (node, where its classifier is in the artifact).
PLACES = {
    "dpt": ("sweep", "generated/"),
    "self_training": ("sweep", "self_training/"),
    "dpt_paper": ("retrained", ""),
    "probe": ("classifier", ""),
}
Validation = tuple[float, float | None] | None  # accuracy and cross-entropy
IMAGES = {f"image_{k}": np.random.default_rng(k).integers(0, 256, (SIZE, SIZE), np.uint8) for k in range(7)}


def network() -> SmallConvNet:
    return SmallConvNet(1, 8, DIM, torch.Generator().manual_seed(0))


def weights(classifier: str) -> np.ndarray:
    seed = list(PLACES).index(classifier)
    return np.random.default_rng(seed).normal(0, 3, (len(CLASSES), DIM)).astype(np.float32)


def publish_run(
    root: Path, *methods: str, overrides: tuple[str, ...] = (), **validation: Validation
) -> Config:
    """A run with an encoder, the classifiers of some methods and the pseudo-labels' temperature."""
    config = load_config(DIGITS, [f"output={root}/output", *overrides])
    nodes, store = flow(config), Store(config.output)
    encoder = nodes["encoder"].artifact(store)
    built = Encoder(network(), conv_spec(network(), Crop("adm", SIZE)))
    encoder.publish_files(lambda folder: save_encoder(folder, built))
    encoder.publish({})
    chosen = {}
    for name in methods:
        node, prefix = PLACES[name]
        out = nodes[node].artifact(store)
        save_classifier(out, weights(name), CLASSES, {}, prefix)
        top1, nll = validation.get(name) or (None, None)
        facts = {"n_validation": 1234, "validation_top1": top1, "validation_nll": nll}
        if prefix:
            chosen[prefix.rstrip("/")] = facts
            facts = {"n_validation": 1234, "chosen": chosen}
        out.publish(facts)
    nodes["pseudo_labels"].artifact(store).publish({"calibration": {"temperature": TEMPERATURE}})
    return config


def expected(image: np.ndarray, classifier: str, temperature: float = 1.0) -> np.ndarray:
    """Class probabilities by the formulas, in torch and double precision."""
    x = (torch.from_numpy(image).double() / 255 - 0.5) / 0.5
    with torch.no_grad():
        feature = network().double()(x[None, None])[0]
    feature = functional.normalize(feature - feature.mean(), dim=0)
    return (torch.from_numpy(weights(classifier)).double() @ feature / temperature).softmax(0).numpy()


def write_folder(folder: Path) -> Path:
    for k, (name, image) in enumerate(IMAGES.items()):
        path = folder / ("" if k < 4 else "deep/er") / f"{name}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    (folder / "notes.txt").write_text("no image")
    return folder


def read(path: Path) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(path).to_pylist()}


def check(row: dict, image: np.ndarray, classifier: str, temperature: float = 1.0) -> None:
    probs = expected(image, classifier, temperature)
    assert row["label"] == probs.argmax()
    assert row["class_name"] == CLASSES[probs.argmax()]
    assert row["confidence"] == pytest.approx(probs.max(), abs=1e-5)
    assert row["classifier"] == classifier
    assert row["error"] is None


@pytest.mark.parametrize("batch_size", [3, 256])
def test_a_folder_is_labelled_with_all_below_it(tmp_path: Path, batch_size: int) -> None:
    config = publish_run(tmp_path, "dpt", overrides=(f"compute.batch_size={batch_size}",))
    folder = write_folder(tmp_path / "new")
    assert predict_images(config, str(folder), tmp_path / "out" / "p.parquet").labelled == len(IMAGES)
    rows = read(tmp_path / "out" / "p.parquet")
    assert len(rows) == len(IMAGES)
    for k, (name, image) in enumerate(IMAGES.items()):
        row = rows[name if k < 4 else f"deep/er/{name}"]
        check(row, image, "dpt")
        assert row["uri"] == (folder / ("" if k < 4 else "deep/er") / f"{name}.PNG").as_uri()


def test_unreadable_images_are_rows_with_the_reason(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    folder = write_folder(tmp_path / "new")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    (folder / "torn.png").write_bytes(encoded(IMAGES["image_0"])[:60])
    assert predict_images(config, str(folder), tmp_path / "p.parquet").labelled == len(IMAGES)
    rows = read(tmp_path / "p.parquet")
    assert len(rows) == len(IMAGES) + 3
    check(rows["image_3"], IMAGES["image_3"], "dpt")
    reasons = {"empty": "zero bytes", "text": "not an image", "torn": "cannot be decoded"}
    for name, reason in reasons.items():
        assert reason in rows[name]["error"]
        assert [rows[name][key] for key in ("label", "class_name", "confidence")] == [None] * 3


def test_a_folder_of_broken_images_alone_is_a_table_too(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    (tmp_path / "a.png").touch()
    assert predict_images(config, str(tmp_path / "a.png"), tmp_path / "p.parquet").labelled == 0
    assert "zero bytes" in read(tmp_path / "p.parquet")["a"]["error"]


@pytest.mark.parametrize(
    ("published", "used"),
    [
        (("probe", "dpt_paper", "self_training", "dpt"), "dpt"),
        (("probe", "dpt_paper"), "dpt_paper"),
        (("probe",), "probe"),
    ],
)
def test_without_validation_images_stage_3_comes_before_stage_1(
    tmp_path: Path, published: tuple[str, ...], used: str
) -> None:
    config = publish_run(tmp_path, *published)
    said = predict_images(config, str(write_folder(tmp_path / "new")), tmp_path / "p.parquet")
    row = read(tmp_path / "p.parquet")["image_1"]
    # Only the first classifier's confidence has a fitted temperature.
    check(row, IMAGES["image_1"], used, TEMPERATURE if used == "probe" else 1.0)
    assert f"7 images labelled by {used} (" in str(said) and "no labelled validation images" in str(said)


@pytest.mark.parametrize(
    ("best", "validation"),
    [
        ("self_training", {"dpt": (0.8, 0.7), "self_training": (0.9, 0.9), "dpt_paper": (0.85, None)}),
        ("self_training", {"dpt": (0.9, 0.7), "self_training": (0.9, 0.6), "dpt_paper": (0.9, None)}),
        ("dpt_paper", {"dpt": (0.8, 0.7), "self_training": (0.7, 0.7), "dpt_paper": (0.9, None)}),
    ],
)
def test_the_best_classifier_on_validation_is_used_and_named(
    tmp_path: Path, best: str, validation: dict[str, Validation]
) -> None:
    config = publish_run(tmp_path, *validation, **validation)
    said = str(predict_images(config, str(write_folder(tmp_path / "new")), tmp_path / "p.parquet"))
    check(read(tmp_path / "p.parquet")["image_1"], IMAGES["image_1"], best)
    assert said.startswith(f"7 images labelled by {best} ({METHODS[best].name}), the best of 3 classifiers: ")
    assert said.endswith("90.0% right on 1,234 validation images")


@pytest.mark.parametrize("given", ["new/all.parquet", "new"])
def test_images_in_parquet_files_are_labelled_as_those_in_files(tmp_path: Path, given: str) -> None:
    config = publish_run(tmp_path, "dpt")
    images = [{"bytes": encoded(image), "path": f"{name}.png"} for name, image in IMAGES.items()]
    (tmp_path / "new").mkdir()
    pq.write_table(pa.table({"img": images}), tmp_path / "new" / "all.parquet", row_group_size=3)
    assert predict_images(config, str(tmp_path / given), tmp_path / "p.parquet").labelled == len(IMAGES)
    for key, row in read(tmp_path / "p.parquet").items():
        check(row, IMAGES[key.rpartition("/")[2]], "dpt")


def test_the_classifier_of_a_named_method_is_used(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt", "probe", dpt=(0.9, 0.5), probe=(0.8, None))
    folder = str(write_folder(tmp_path / "new"))
    said = str(predict_images(config, folder, tmp_path / "p.parquet", "probe"))
    check(read(tmp_path / "p.parquet")["image_1"], IMAGES["image_1"], "probe", TEMPERATURE)
    assert said.startswith(f"7 images labelled by probe ({METHODS['probe'].name}): 80.0% right on")
    with pytest.raises(
        ConfigError, match=r"--method student: run .* has no such classifier .*; it has dpt, pr"
    ):
        predict_images(config, folder, tmp_path / "q.parquet", "student")


def test_images_of_another_size_are_cropped_as_the_run_does(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    # ADM's crop halves 16 x 24 to 8 x 12 by averaging, here of equal pixels, and cuts the centre out.
    wide = np.random.default_rng(9).integers(0, 256, (8, 12), np.uint8)
    Image.fromarray(np.kron(wide, np.ones((2, 2), np.uint8))).convert("RGB").save(tmp_path / "wide.png")
    predict_images(config, str(tmp_path / "wide.png"), tmp_path / "p.parquet")
    check(read(tmp_path / "p.parquet")["wide"], np.ascontiguousarray(wide[:, 2:10]), "dpt")


@pytest.mark.parametrize("folder", [False, True])
def test_tars_are_labelled(tmp_path: Path, folder: bool) -> None:
    config = publish_run(tmp_path, "dpt")
    (tmp_path / "tars").mkdir()
    members = {f"{name}.png": encoded(image) for name, image in IMAGES.items()}
    (tmp_path / "tars" / "a.tar").write_bytes(tar_of(members))
    source = tmp_path / "tars" if folder else tmp_path / "tars" / "a.tar"
    assert predict_images(config, str(source), tmp_path / "p.parquet").labelled == len(IMAGES)
    for name, row in read(tmp_path / "p.parquet").items():
        check(row, IMAGES[name], "dpt")


def test_a_manifest_is_labelled_in_its_order(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    write_folder(tmp_path / "new")
    (tmp_path / "new" / "list.csv").write_text(
        "uri,id\nimage_2.PNG,second\ndeep/er/image_5.PNG,fifth\nimage_0.PNG,zeroth\n"
    )
    assert predict_images(config, str(tmp_path / "new" / "list.csv"), tmp_path / "p.parquet").labelled == 3
    rows = read(tmp_path / "p.parquet")
    assert list(rows) == ["second", "fifth", "zeroth"]
    check(rows["fifth"], IMAGES["image_5"], "dpt")


def test_csv_says_the_same_as_parquet(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    folder = write_folder(tmp_path / "new")
    (folder / "bad,one.png").touch()
    for out in ("p.csv", "p.parquet"):
        predict_images(config, str(folder), tmp_path / out)
    with (tmp_path / "p.csv").open(newline="") as file:
        found = {row["id"]: row for row in csv.DictReader(file)}
    table = read(tmp_path / "p.parquet")
    assert list(found) == list(table)
    for key, row in table.items():
        confidence = found[key].pop("confidence")
        assert (float(confidence) if confidence else None) == pytest.approx(row.pop("confidence"))
        assert found[key] == {name: "" if value is None else str(value) for name, value in row.items()}


def test_a_table_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = publish_run(tmp_path, "dpt")
    folder = write_folder(tmp_path / "new")
    out = tmp_path / "tables" / "p.csv"
    predict_images(config, str(folder / "image_0.PNG"), out)
    before = out.read_bytes()

    def broken(table: pa.Table, path: Path) -> None:
        Path(path).write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setitem(predict.WRITERS, ".csv", broken)
    with pytest.raises(ConfigError, match="cannot be written: the disk is full"):
        predict_images(config, str(folder), out)
    assert [path.name for path in out.parent.iterdir()] == ["p.csv"]
    assert out.read_bytes() == before


def test_a_table_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = publish_run(tmp_path, "dpt")
    monkeypatch.setattr(predict, "_batches", lambda *arguments: pytest.fail("images are being labelled"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^out: '.*p\.csv': '.*file' cannot be written \(.*choose another"):
        predict_images(config, str(write_folder(tmp_path / "new")), tmp_path / "file" / "p.csv")


def test_an_unfinished_run_is_asked_for(tmp_path: Path) -> None:
    config = publish_run(tmp_path)
    write_folder(tmp_path / "new")
    with pytest.raises(ConfigError, match=r"run digits has no classifier .* run `dpt run CONFIG` first"):
        predict_images(config, str(tmp_path / "new"), tmp_path / "p.csv")


def test_bad_requests_name_what_is_wrong(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").touch()
    (tmp_path / "torn.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "list.csv").write_text("uri\nlost.png\n")
    out = tmp_path / "p.csv"
    with pytest.raises(ConfigError, match=r"p\.txt' must end in \.csv or \.parquet"):
        predict_images(config, str(tmp_path / "new"), tmp_path / "p.txt")
    for source, problem in {
        "nowhere": "does not exist",
        "new": "has no image",
        "new/notes.txt": "has no image",
        "torn.tar": "not a complete uncompressed tar",
        "list.csv": r"lists files that do not exist: .*lost\.png",
    }.items():
        with pytest.raises(ConfigError, match=f"images: .*{source}.*{problem}"):
            predict_images(config, str(tmp_path / source), out)
    assert not out.exists()


def write_small_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES["image_0"]).save(folder / name / f"{len(list(folder.rglob('*.png')))}.png")


def test_a_run_labels_though_its_own_images_have_changed_or_are_gone(tmp_path: Path) -> None:
    write_small_images(tmp_path / "own", "a", "b")
    own = ("data.source=folder", f"data.uri={tmp_path / 'own'}")
    config = publish_run(tmp_path, "probe", overrides=own)
    link(config, flow(config), Store(config.output))
    before = predict.load_labeller(config)
    write_small_images(tmp_path / "own", "a")
    assert not flow(config)["classifier"].artifact(Store(config.output)).published
    np.testing.assert_array_equal(predict.load_labeller(config).weights, before.weights)
    shutil.rmtree(tmp_path / "own")
    np.testing.assert_array_equal(predict.load_labeller(config).weights, before.weights)
    # Other settings are another run; there is nothing to fall back on.
    other = load_config(DIGITS, [f"output={tmp_path}/output", *own, "classifier.l2=0.5"])
    with pytest.raises(ConfigError, match=r"data\.uri: .*own' cannot be read"):
        predict.load_labeller(other)


def test_images_of_16_bits_are_counted_in_a_note(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    folder = write_folder(tmp_path / "new")
    assert "note" not in str(predict_images(config, str(folder), tmp_path / "p.csv"))
    for name in ("deep_0", "deep_1"):
        Image.fromarray(np.full((SIZE, SIZE), 20_000, np.uint16)).save(folder / f"{name}.png")
    said = str(predict_images(config, str(folder), tmp_path / "p.csv"))
    assert "note: 2 images have more than 8 bits a value" in said


def test_labels_that_were_corrected_after_the_run_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("id,label\n0,3\n")
    listed = ("labels.per_class=null", f"labels.file={file}")
    config = publish_run(tmp_path, "probe", overrides=listed)
    nodes, store = flow(config), Store(config.output)
    nodes["labels"].artifact(store).publish({"settings": nodes["labels"].hashed})
    link(config, nodes, store)
    folder = write_folder(tmp_path / "new")
    predict_images(config, str(folder), tmp_path / "p.csv")
    assert "another list" not in caplog.text
    file.write_text("id,label\n0,4\n")
    predict_images(config, str(folder), tmp_path / "p.csv")
    assert f"labels.file {file} was another list when this run was made" in caplog.text


def test_an_image_whose_features_are_not_finite_has_no_label(tmp_path: Path) -> None:
    config = publish_run(tmp_path, "dpt")
    model = config.output + "/store/encoder"
    [file] = Path(model).rglob("*.safetensors")
    save_file({key: torch.full_like(value, torch.nan) for key, value in load_file(file).items()}, file)
    folder = write_folder(tmp_path / "new")
    assert predict_images(config, str(folder), tmp_path / "p.parquet").labelled == 0
    row = read(tmp_path / "p.parquet")["image_0"]
    assert (row["label"], row["confidence"]) == (None, None)
    assert row["error"] == "its features are not finite; set encoder.precision=float32"


def publish_rung(config: Config, name: str, top1: float, temperature: float) -> None:
    """Adds a rung of the ladder to a run."""
    out = flow(config)[name].artifact(Store(config.output))
    save_classifier(out, weights("self_training"), CLASSES, {})
    facts = {"n_validation": 1234, "validation_top1": top1, "validation_nll": 0.5}
    out.publish({**facts, "calibration": {"temperature": temperature, "n": 1234}})


@pytest.mark.parametrize(("rung", "used"), [(0.95, "propagation"), (0.8, "dpt_paper")])
def test_a_rung_of_the_ladder_is_used_where_it_is_the_best(tmp_path: Path, rung: float, used: str) -> None:
    validation = {"probe": (0.7, None), "dpt_paper": (0.9, None)}
    config = publish_run(tmp_path, *validation, overrides=("ladder={}",), **validation)
    publish_rung(config, "propagation", rung, 0.5)
    said = str(predict_images(config, str(write_folder(tmp_path / "new")), tmp_path / "p.parquet"))
    assert f"labelled by {used} " in said and "the best of 3 classifiers" in said
    row = read(tmp_path / "p.parquet")["image_1"]
    probs = expected(IMAGES["image_1"], "self_training" if used == "propagation" else used, 0.5)
    if used == "propagation":
        assert row["confidence"] == pytest.approx(probs.max(), abs=1e-5)
    assert row["classifier"] == used and row["label"] == probs.argmax()
    folder = tmp_path / "classifier"
    assert export_model(config, "classifier", folder) == weights("probe").size
    told = json.loads((folder / "config.json").read_text())
    assert (told["method"], told["temperature"]) == (used, 0.5 if used == "propagation" else 1.0)
    exported = load_file(folder / "model.safetensors")["weight"].numpy()
    assert (exported @ np.zeros(DIM) == 0).all() and exported.shape == (len(CLASSES), DIM)
