"""Each command with each kind of bad input: exit code 2, one line, no traceback, nothing made of it.

What the lines say in full is tested beside what says it; here it is the key or the value alone.
"""

import itertools
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

from dpt_ray.cli import STAGES, app
from dpt_ray.commands import predict
from tests.helpers.paths import DIGITS
from tests.helpers.tiny_run import files

PROGRESS = re.compile(r"\[\d+/\d+\] \w+: ")
CONFIGURED = [
    name
    for name, command in get_command(app).commands.items()
    if "config" in [parameter.name for parameter in command.params]
]
STUDY = f"base: {DIGITS}\nname: s\nstudy: {{labels_per_class: [1], encoder_seeds: [0], draws: 1}}\n"


@pytest.fixture
def place(tmp_path, no_credentials):
    """The current folder, in which relative paths lie: images of two classes, and what is no folder."""
    for name in ("rose", "tulip"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "flowers" / name / f"{number}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder, no image, no YAML: {")
    (tmp_path / "torn.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path


def write(path, content, **values):
    path.write_bytes(content if isinstance(content, bytes) else content.format(**values).encode())


def line(command, config=None, *overrides):
    """The arguments of a command that has a configuration."""
    config = config or ("study.yaml" if command == "study" else DIGITS)
    more = {
        "predict": ["flowers", "--out", "predicted.csv"],
        "export": ["npz", "exported.npz"],
        "export-model": ["safetensors", "model"],
    }
    if command in more:
        return [command, config, *more[command], *(f"--set={override}" for override in overrides)]
    if command == "suggest":
        return [command, config, "4", *overrides, "--out", "chosen"]
    return [command, config, *overrides]


@pytest.fixture
def refused(dpt, place):
    """Run `dpt` and see it refuse in the agreed form; `made` are the stages whose results may stay."""

    def run(arguments, *said, made=()):
        before = files(place)
        code, out, err = dpt(*arguments)
        told = [text for text in err.splitlines() if not PROGRESS.match(text)]
        assert (code, len(told), out) == (2, 1, ""), (code, out, err)
        assert told[0].startswith("error: ") and "Traceback" not in err
        for part in said:
            assert part in told[0]
        after = files(place)
        assert before.items() <= after.items()
        new = {path.relative_to(place).parts for path in after.keys() - before.keys()}
        # A run that begins notes what it will rest on, so that nobody removes it meanwhile.
        noted = {parts for parts in new if made and parts[1] == "runs" and parts[-1] == "planned.json"}
        assert {parts[2] for parts in new - noted} <= set(made)

    return run


# Configurations ------------------------------------------------------------------------------------

CONFIGS = {
    "gone": (None, "bad.yaml"),
    "list": ("- a\n", "bad.yaml"),
    "no YAML": ("a: [1\n", "bad.yaml"),
    "binary": (b"\xff\xfe\x00", "bad.yaml"),
    "empty": ("", "bad.yaml"),
    "base gone": ("base: none.yaml\n", "none.yaml"),
    "circular": ("base: bad.yaml\n", "bad.yaml"),
    "unknown section": ("base: {base}\ndifusion: 3\n", "difusion"),
    "section of another kind": ("base: {base}\ncompute: 3\n", "compute"),
}


@pytest.mark.parametrize("command", CONFIGURED)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bad_configuration_is_refused(refused, place, command, kind):
    content, said = CONFIGS[kind]
    if content is not None:
        write(place / "bad.yaml", content, base="study.yaml" if command == "study" else DIGITS)
    refused(line(command, "bad.yaml"), said)


@pytest.mark.parametrize("command", CONFIGURED)
def test_a_folder_is_no_configuration(refused, command):
    refused(line(command, "flowers"), "flowers")


OVERRIDES = {
    "unknown key": ("generate.gidance=2", "generate.gidance"),
    "wrong type": ("pretrain.steps=many", "pretrain.steps"),
    "out of range": ("diffusion.ema_decay=2", "diffusion.ema_decay"),
    "no value": ("pretrain.steps", "'pretrain.steps'"),
    "no YAML": ("sweep.l2=[1", "sweep.l2"),
    "does not fit another": ("diffusion.model.patch_size=3", "diffusion.model.patch_size"),
    "unknown output": ("output=nosuch://x", "nosuch"),
    "output with a pattern": ("output=s3://bucket/[x]", "'[', which object stores take for a pattern"),
    "output of nobody": ("output=s3://bucket/x", "s3://bucket/x"),
    "images gone": ("data={source: folder, uri: gone, image_size: 16}", "gone"),
    "images of nobody": ("data={source: folder, uri: 's3://bucket/x', image_size: 16}", "s3://bucket/x"),
}


# A job's output is that of the cluster's nodes, with their credentials: who submits cannot look at it.
SEEN_BY_NODES = {("submit", kind) for kind in ("unknown output", "output of nobody", "output with a pattern")}


@pytest.mark.parametrize(
    ("command", "kind"), sorted({*itertools.product(CONFIGURED, OVERRIDES)} - SEEN_BY_NODES)
)
def test_a_bad_setting_is_refused(refused, command, kind):
    override, said = OVERRIDES[kind]
    refused(line(command, None, override), said)


# What only stages that make something read ------------------------------------------------------------

FLOWERS = (
    "output=out",
    "data={source: folder, uri: flowers, mode: RGB, image_size: 16, validation: 2, test: 2}",
    "labels={file: few.csv, per_class: null}",
    "diffusion.model.patch_size=4",
)
LABELS = {
    "unknown image": ("id,label\nrose/99,rose\n", "rose/99"),
    "unknown class": ("id,label\nrose/0,lily\n", "lily"),
    "no class": ("id,label\nrose/0,\n", "line 2"),
    "duplicate": ("id,label\nrose/0,rose\nrose/0,rose\n", "line 3"),
    "contradiction": ("id,label\nrose/0,rose\nrose/0,tulip\n", "line 3"),
    "empty file": ("", "few.csv"),
    "no lines": ("id,label\n", "few.csv"),
    "other columns": ("name,kind\nrose/0,rose\n", "line 1"),
    "binary": (b"\xff\xfe\x00", "few.csv"),
    "gone": (None, "few.csv"),
}


@pytest.fixture(params=LABELS)
def bad_labels(request, place):
    """A bad list few.csv; what is said of it."""
    content, said = LABELS[request.param]
    if content is not None:
        write(place / "few.csv", content)
    return said


@pytest.mark.parametrize("command", ["run", "index", "generate", "report"])
def test_a_bad_label_list_is_refused_before_any_work_but_the_index(refused, command, bad_labels):
    refused(line(command, None, *FLOWERS), bad_labels, made=("index",))


# A list without a line is one before the first label.
@pytest.mark.parametrize("bad_labels", sorted(LABELS.keys() - {"no lines"}), indirect=True)
def test_images_to_label_are_not_chosen_beside_a_bad_label_list(refused, place, bad_labels):
    more = [] if (place / "few.csv").exists() else ["--given", "few.csv"]  # without labels.file it is fine
    refused([*line("suggest", None, *FLOWERS), *more], bad_labels, made=("index",))


@pytest.mark.parametrize("command", ["run", "index", "pretrain"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output=file/out", "file/out"),
        ("data={source: folder, uri: empty, image_size: 16}", "data: "),
        ("data={source: tar, uri: torn.tar, image_size: 16}", "torn.tar"),
        ("data={source: parquet, uri: torn.tar, image_size: 16}", "torn.tar"),
        ("data={source: manifest, uri: file, image_size: 16}", "file"),
        ("labels.per_class=500", "labels.per_class"),
    ],
)
def test_what_a_run_cannot_start_from_is_refused(refused, command, override, said):
    made = () if override.startswith("output") else ("index",)
    output = () if override.startswith("output") else ("output=out",)
    refused(line(command, None, *output, override), said, made=made)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("study.labels_per_class=[500]", "s-n500-e0-d0: study.labels_per_class"),
        ("labels.file=few.csv", "labels.file"),
    ],
)
def test_what_a_studys_runs_cannot_start_from_is_refused(refused, override, said):
    refused(line("study", None, "output=out", override), said, made=("index",))


class Code:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("loaded",)


RGB = ("output=out", "data.mode=RGB", "data.image_size=16", "labels.per_class=1")
USES = {
    "encoder.weights": ("pretrain", "encoder.kind=msn"),
    "autoencoder.weights": ("train-diffusion", "autoencoder.kind=kl"),
    "diffusion.weights": ("train-diffusion", "diffusion.condition=true_labels"),
    "evaluate.inception": ("measure",),
}


@pytest.mark.parametrize("key", USES)
@pytest.mark.parametrize("kind", ["gone", "torn", "pickled code", "of another network"])
def test_foreign_weights_that_are_not_those_asked_for_are_refused(refused, place, key, kind):
    path = place / "foreign.pth"
    if kind == "torn":
        path.write_bytes(b"PK\x03\x04 and no more")
    elif kind == "pickled code":
        torch.save({"weight": Code()}, path)
    elif kind == "of another network":
        torch.save({"weight": torch.zeros(2)}, path)
    command, *more = USES[key]
    known = {"gone": ()}.get(kind, ("index", "labels", "autoencoder"))
    refused(line(command, None, *RGB, *more, f"{key}=foreign.pth"), "foreign.pth", made=known)
    assert not (place / "loaded").exists()


# The other commands --------------------------------------------------------------------------------

NEW_IMAGES = {
    "gone": "gone",
    "empty": "empty",
    "torn.tar": "torn.tar",
    "file": "file",
    "nosuch://x": "nosuch",
    "s3://bucket/x": "s3://bucket/x",
}


@pytest.mark.parametrize("images", NEW_IMAGES)
def test_new_images_that_cannot_be_listed_are_refused(refused, monkeypatch, images):
    monkeypatch.setattr(predict, "load_labeller", lambda config, method: None)
    refused(["predict", DIGITS, images, "--out", "predicted.csv"], NEW_IMAGES[images])


@pytest.mark.parametrize("out", ["predicted.txt", "file/predicted.csv"])
def test_a_table_that_cannot_be_written_is_refused(refused, monkeypatch, out):
    monkeypatch.setattr(predict, "load_labeller", lambda config, method: None)
    refused(["predict", DIGITS, "flowers", "--out", out, "--set=output=out"], out)


@pytest.mark.parametrize("images", NEW_IMAGES)
def test_a_configuration_is_not_written_for_images_that_cannot_be_listed(refused, place, images):
    (place / "few.csv").write_text("id,label\nrose/0,rose\n")
    refused(["init", images, "--labels", "few.csv", "--out", "new.yaml"], "init: ")


def test_a_configuration_is_not_written_for_a_bad_label_list(refused, bad_labels):
    refused(["init", "flowers", "--labels", "few.csv", "--out", "new.yaml"], bad_labels)


@pytest.mark.parametrize("out", ["file", "file/new.yaml"])
def test_a_configuration_is_not_written_over_or_below_a_file(refused, place, out):
    (place / "few.csv").write_text("id,label\nrose/0,rose\ntulip/0,tulip\n")
    refused(["init", "flowers", "--labels", "few.csv", "--out", out], out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", DIGITS, "zip", "exported"], "'zip'"),
        (["export", DIGITS, "npz", "exported"], "exported"),
        (["export", DIGITS, "npz", "exported.npz"], "digits"),  # a run that made no images
        (["export-model", DIGITS, "torchscript", "model"], "'torchscript'"),
        (["export-model", DIGITS, "onnx", "model"], "digits"),
        (["export-model", DIGITS, "safetensors", "model"], "digits"),
        (["predict", DIGITS, "flowers", "--out", "predicted.csv"], "digits"),
    ],
)
def test_what_cannot_be_exported_or_is_not_made_is_refused(refused, arguments, said):
    refused([*arguments, "--set=output=out"], said)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_results_that_are_no_studys_are_refused(refused, place, content):
    if content is not None:
        (place / "study.json").write_text(content)
    refused([*line("study"), "--results", "study.json", "output=out"], "study.json")


def test_a_run_is_no_study(refused):
    refused(["study", DIGITS], "study")


@pytest.mark.parametrize("command", [["list"], ["remove", "--unused", "--yes"], ["remove", "--yes"]])
@pytest.mark.parametrize("output", ["gone", "empty", "file", "nosuch://x", "s3://bucket/x"])
def test_what_holds_no_runs_is_refused(refused, command, output):
    more = ["stage/hash"] if command == ["remove", "--yes"] else []
    refused([*command, output, *more], output)


@pytest.mark.parametrize("name", ["stage/zzz", "stage", "../../flowers"])
def test_what_is_no_artifact_is_not_removed(refused, place, name):
    (place / "out" / "store").mkdir(parents=True)
    refused(["remove", "out", name, "--yes"], name)


def test_every_command_is_fed_here():
    here = {*CONFIGURED, *STAGES, "init", "list", "remove"}
    assert set(get_command(app).commands) == here
