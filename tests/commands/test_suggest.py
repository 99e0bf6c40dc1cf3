"""`dpt suggest`: a list and a page of images to label, before and after the first label."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from dpt_ray.commands.suggest import suggest_images
from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.labels import read_label_list
from dpt_ray.data.shards import write_features
from dpt_ray.data.units import list_units, read_index, read_unit
from dpt_ray.pipeline.flow import flow
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.runs import make, quiet

KINDS, EACH = 3, 12  # clusters of images, and their size
LABELS = "labels={file: labels.csv, per_class: null}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with images of three kinds (their colour) that no folder and no list tells."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(KINDS * EACH):
        pixels = np.full((16, 24, 3), 80 * (number % KINDS), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number:02d}.png")
    return tmp_path


def with_features(*overrides):
    """A configuration whose index, encoder and features are made: clusters by the number in the id."""
    data = "data={source: folder, uri: pictures, mode: RGB, image_size: 16}"
    config = load_config(DIGITS, [data, LABELS, "diffusion.model.patch_size=4", "output=out", *overrides])
    make(config, "index")
    nodes, store = flow(config), Store(str(config.output))
    index, out = nodes["index"].artifact(store), nodes["features"].artifact(store)
    nodes["encoder"].artifact(store).publish({})
    rng, shards = np.random.default_rng(0), []
    for unit in list_units(index):
        ids, _ = read_unit(index, unit)
        kind = np.array([int(name.rpartition("/")[2]) % KINDS for name in ids])
        rows = (10 * np.eye(KINDS, 6)[kind] + rng.normal(0, 0.1, (len(ids), 6))).astype(np.float32)
        write = lambda path, ids=ids, rows=rows: write_features(path, ids, rows)  # noqa: E731
        shards.append(out.publish_shard(unit["shard"], ".parquet", len(ids), write))
    out.publish({"shards": shards})
    return config, index


def written(folder):
    """The rows of the list, and what the page's script is given."""
    with (folder / "to_label.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    html = (folder / "to_label.html").read_text(encoding="utf-8")
    [text] = re.findall(r'<script type="application/json" id="page">(.*?)</script>', html)
    return rows, json.loads(text)


def kinds(rows):
    return {int(row["id"]) % KINDS for row in rows}


def test_images_without_any_label_or_class_are_suggested(place):
    config, _ = with_features()
    suggested = suggest_images(config, KINDS, place / "new", None, quiet())
    rows, page = written(place / "new")
    assert kinds(rows) == {0, 1, 2}
    assert [row["label"] for row in rows] == [""] * KINDS
    assert [image["id"] for image in page["images"]] == [row["id"] for row in rows]
    assert (page["classes"], page["given"], page["open"]) == ([], [], True)
    assert (suggested.images, suggested.given, suggested.classes_known) == (KINDS * EACH, 0, False)
    assert "data.classes" in str(suggested)


def test_kinds_with_a_label_are_passed_over_and_their_labels_stay_in_the_page(place):
    config, _ = with_features()
    (place / "labels.csv").write_text("id,label\n00.png,black\n03,black\n")
    suggested = suggest_images(config, 2, place / "new", None, quiet())
    rows, page = written(place / "new")
    assert kinds(rows) == {1, 2}
    assert (page["classes"], page["given"]) == (["black"], [["00", "black"], ["03", "black"]])
    assert suggested.given == 2


def test_a_list_that_is_given_counts_instead_of_the_runs(place):
    config, _ = with_features("data.classes=[black, grey]")
    (place / "labels.csv").write_text("id,label\n00,black\n")
    (place / "other.csv").write_text("id,label\n01,grey\n")
    suggest_images(config, 2, place / "new", "other.csv", quiet())
    rows, page = written(place / "new")
    assert kinds(rows) == {0, 2}
    assert (page["classes"], page["open"]) == (["black", "grey"], False)


def test_drawn_labels_do_not_count(place):
    config, _ = with_features("labels={per_class: 1, file: null}", "data.classes=[black, grey]")
    assert suggest_images(config, 3, place / "new", None, quiet()).given == 0


def test_the_same_seed_writes_the_same_files_again(place):
    config, _ = with_features()
    for folder in ("one", "two", "two"):
        suggest_images(config, 5, place / folder, None, quiet())
    for name in ("to_label.csv", "to_label.html"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()


def test_the_list_filled_in_by_hand_is_a_label_list_and_half_filled_in_names_the_line(place):
    config, index = with_features("data.classes=[black, grey]")
    suggest_images(config, 3, place / "new", None, quiet())
    rows, _ = written(place / "new")
    table = read_index(index)

    def filled(labels):
        text = "".join(f"{row['id']},{label}\n" for row, label in zip(rows, labels, strict=True))
        (place / "by_hand.csv").write_text(f"id,label\n{text}")
        return read_label_list("by_hand.csv", "csv", table, ["black", "grey"])

    assert filled(["grey", "black", "grey"])["label"].to_pylist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"line 3: .* has no label; give one or remove the line"):
        filled(["grey", "", "grey"])


def test_labels_of_a_source_without_classes_say_what_to_set(place):
    config, _ = with_features()
    (place / "labels.csv").write_text("id,label\n00,black\n01,dark grey\n")
    with pytest.raises(ConfigError, match=r'labels.file: .*data.classes=\["black", "dark grey"\]$'):
        make(config, "labels")


@pytest.mark.parametrize(
    ("labels", "count", "given", "said"),
    [
        ("", 37, None, "36 have no label: ask for fewer"),
        ("id,label\n00,black\n", 36, None, "35 have no label: ask for fewer"),
        ("id,label\n99,black\n", 3, None, "labels.file: .*line 2: no image '99'"),
        ("id,label\n00,\n", 3, None, "labels.file: .*line 2: 00 has no label"),
        ("", 3, "gone.csv", "given: .*gone.csv"),
    ],
)
def test_bad_input_is_one_line(place, labels, count, given, said):
    config, _ = with_features()
    if labels:
        (place / "labels.csv").write_text(labels)
    with pytest.raises(ConfigError, match=said) as caught:
        suggest_images(config, count, place / "new", given, quiet())
    assert "\n" not in str(caught.value)
    assert not (place / "new" / "to_label.csv").exists()


def test_images_that_are_gone_are_named(place):
    config, _ = with_features()
    suggest_images(config, 36, place / "new", None, quiet())
    (place / "pictures" / "07.png").write_bytes(b"torn")
    make(config, "index")  # the images are others now, and so is their index
    with pytest.raises(ConfigError, match="image 07 is not what it was"):
        suggest_images(with_features()[0], 36, place / "new", None, quiet())


def test_a_folder_that_cannot_be_written_is_told_first(place):
    config, _ = with_features()
    (place / "file").write_text("")
    with pytest.raises(ConfigError, match="out: 'file/new'"):
        suggest_images(config, 3, (place / "file/new").relative_to(place), None, quiet())


def test_a_list_that_a_person_filled_in_is_not_replaced(place):
    config, _ = with_features()
    for _ in range(2):  # an empty one is
        suggest_images(config, 3, place / "new", None, quiet())
    list_ = place / "new" / "to_label.csv"
    filled = list_.read_text().replace(",\n", ",grey\n", 1)
    list_.write_text(filled)
    with pytest.raises(ConfigError, match=r"to_label\.csv' has 1 labels, .*--out$"):
        suggest_images(config, 3, place / "new", None, quiet())
    assert list_.read_text() == filled


@pytest.mark.parametrize("given", [None, "labels.csv"])
def test_a_list_of_no_labels_yet_is_none(place, given):
    config, _ = with_features()
    (place / "labels.csv").write_text("id,label\n")
    assert suggest_images(config, 3, place / "new", given, quiet()).given == 0
