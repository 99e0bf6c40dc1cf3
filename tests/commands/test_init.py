"""`dpt init`: a configuration for one's own images that is valid and says what was found."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.main import get_command

from dpt_ray.cli import app
from dpt_ray.cluster.session import unused_gpus
from dpt_ray.commands import init as start
from dpt_ray.commands.init import write_config
from dpt_ray.commands.inspection import look
from dpt_ray.commands.recipe import START, Images, learner_training
from dpt_ray.config import ConfigError, load_config
from dpt_ray.config.ladder import Ladder
from dpt_ray.config.sections import Compute
from dpt_ray.data.units import read_index
from dpt_ray.engine.progress import duration
from dpt_ray.pipeline.cost import costs, total_seconds
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.run import run
from dpt_ray.pipeline.speed import Rates
from dpt_ray.store.artifact import Store
from tests.helpers.runs import make, quiet


def draw(path, side=20, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side + 5, 3), 9, np.uint8)).convert(mode).save(path)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A machine of a speed of its own."""
    rates = Rates(conv=50e9, transformer=80e9, device="cpu")
    monkeypatch.setattr(start, "machine_rates", lambda config, threads: rates)
    monkeypatch.setattr(start, "measure_view", lambda views, side: 1e-5 * side)
    return rates


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
    path, found, _ = write_config(
        str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml"
    )
    config = load_config(path, [f"output={classes}/out"])
    assert (config.name, config.data.source, config.data.image_size) == ("my-flowers", "folder", 16)
    assert (config.data.validation, config.data.test) == (3, 3)  # a tenth of the other 36
    assert (config.pretrain.network, config.pretrain.augmentation) == ("resnet", "photographs")
    assert config.evaluate.augmentation == "photographs"
    assert str(found) == "40 train images as folder; 4 labels of 2 classes (rose, tulip); 16 pixels, RGB"
    assert f"`dpt init`: {found}" in path.read_text()
    assert make(config, "labels") == ["index", "labels"]


def test_a_class_without_a_label_is_warned_of_in_one_line(dpt, classes):
    (classes / "labels.csv").write_text("id,label\nrose/0,rose\n")
    given = (classes / "my flowers", "--labels", classes / "labels.csv", "--out", classes / "c.yaml")
    code, out, _ = dpt("init", *given)
    assert code == 0
    [line] = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: no label of tulip (1 of 2 classes); label an image of each")
    (classes / "labels.csv").write_text("id,label\nrose/0,rose\ntulip/0,tulip\n")
    assert "warning" not in dpt("init", *given[:-1], classes / "d.yaml")[1]
    assert "warning" not in dpt("init", classes / "my flowers", "--out", classes / "e.yaml")[1]


def test_a_label_list_that_does_not_exist_is_named_with_its_key(dpt, classes):
    code, _, err = dpt("init", classes / "my flowers", "--labels", "gone.csv", "--out", classes / "c.yaml")
    assert code == 2 and "--labels: 'gone.csv' does not exist; give the path" in err and err.count("\n") == 1


def test_before_the_first_label_the_configuration_serves_to_choose_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png")
    path, found, _ = write_config("images", None, None)
    config = load_config(path, ["output=out"])
    assert str(found) == "5 train images as folder; 0 labels of 0 classes; 16 pixels, RGB"
    assert (config.labels.file, config.data.classes, config.data.keep_in_train) == ("labels.csv", (), ())
    assert make(config, "index") == ["index"]
    assert not flow(config)["features"].missing
    assert "labels.csv" in flow(config)["classifier"].missing


def test_true_classes_before_the_first_label_give_splits_without_a_list(classes):
    path, _, _ = write_config(str(classes / "my flowers"), None, classes / "c.yaml")
    data = load_config(path).data
    assert (data.validation, data.test, data.keep_in_train) == (4, 4, ())
    assert not (classes / "c.kept.csv").exists()


@pytest.mark.parametrize(("side", "mode"), [(32, "L"), (64, "RGB")])
def test_grey_images_stay_grey_unless_published_weights_want_colour(tmp_path, side, mode):
    for number in range(3):
        draw(tmp_path / "images" / f"{number}.png", side, "L")
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n1,rose\n")
    path, found, _ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    config = load_config(path)
    assert (found.mode, config.data.mode) == ("L", mode)
    if mode == "L":
        assert (config.pretrain.network, config.pretrain.augmentation) == ("small_conv", "digits")


def test_without_class_folders_the_list_names_the_classes(tmp_path):
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png", 300, "L")
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    path, *_ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    config = load_config(path, [f"output={tmp_path}/out"])
    assert config.data.classes == ("rose", "tulip")
    assert (config.data.image_size, config.data.mode, config.data.test) == (256, "RGB", 0)
    assert (config.encoder.kind, config.autoencoder.kind) == ("timm", "kl")


def test_classes_that_are_numbered_from_1_are_listed(tmp_path):
    draw(tmp_path / "one.png")
    image = {"bytes": (tmp_path / "one.png").read_bytes()}
    (tmp_path / "images").mkdir()
    table = pa.table({"image": [image] * 60, "label": [1 + n % 3 for n in range(60)]})
    pq.write_table(table, tmp_path / "images" / "train.parquet")
    rows = [f"train-{n:06d},{1 + n % 3}" for n in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows]) + "\n")
    path, found, _ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    assert "data.classes lists those that occur, 1 to 3" in found.notes[0]
    config = load_config(path, [f"output={tmp_path}/out"])
    assert config.data.classes == ("1", "2", "3") and config.data.test == 5
    assert make(config, "labels") == ["index", "labels"]


def test_the_classes_of_the_configuration_are_those_of_the_index(tmp_path):
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png")
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    path, *_ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    _, store = run(load_config(path, [f"output={tmp_path}/out"]), quiet(), ["labels"])
    [digest] = store.digests("index")
    assert store.artifact("index", digest).read_json("classes.json") == ["rose", "tulip"]


def test_the_configuration_is_the_same_run_from_any_folder(classes, monkeypatch):
    monkeypatch.chdir(classes)
    path, found, _ = write_config("my flowers", "labels.csv", None)
    tree = yaml.safe_load(path.read_text())
    assert tree["data"]["uri"] == str(classes / "my flowers")
    assert tree["data"]["keep_in_train"] == [str(classes / f"{path.stem}.kept.csv")]
    assert tree["labels"]["file"] == str(classes / "labels.csv") and not found.notes


def test_a_ladder_is_written_where_every_class_has_a_label_for_it(classes):
    images, labels = str(classes / "my flowers"), classes / "labels.csv"
    whole, *_ = write_config(images, str(labels), classes / "whole.yaml")
    assert load_config(whole).ladder == Ladder()
    labels.write_text("id,label\nrose/0.png,rose\n")
    path, found, _ = write_config(images, str(labels), classes / "part.yaml")
    assert load_config(path).ladder is None and "no label of tulip" in found.notes[0]


def test_a_flat_folder_with_a_list_has_nothing_to_measure_on_and_init_says_so(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    arguments = ["init", str(tmp_path / "images"), "--labels", str(tmp_path / "labels.csv")]
    get_command(app)([*arguments, "--out", str(tmp_path / "c.yaml")], standalone_mode=False)
    assert "no labels but the few, so nothing is chosen or measured" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["c.yaml", "c.kept.csv"])
def test_a_file_that_is_there_is_not_overwritten(classes, name):
    (classes / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"{name}' exists; remove it or name another"):
        write_config(str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml")
    assert (classes / name).read_text() == "mine"
    assert len([path for path in classes.iterdir() if path.name.startswith("c.")]) == 1


def test_labels_that_are_added_later_redo_only_what_follows_from_labels(classes):
    path, *_ = write_config(str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml")
    config = load_config(path, [f"output={classes}/out"])
    make(config, "labels")
    before = {name: node.digest for name, node in flow(config).items()}
    train = split_of(config, "train")
    new = next(key for key in sorted(train) if key not in (classes / "labels.csv").read_text())
    with (classes / "labels.csv").open("a") as file:
        file.write(f"{new}.png,{new.partition('/')[0]}\n")
    same = {name for name, node in flow(config).items() if node.digest == before[name]}
    assert {"index", "encoder", "features", "moments"} <= same
    assert not {"labels", "classifier", "pseudo_labels", "denoiser"} & same
    assert make(config, "labels") == ["labels"]


def test_a_label_that_is_added_for_an_image_set_aside_is_told(classes):
    path, *_ = write_config(str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml")
    config = load_config(path, [f"output={classes}/out"])
    make(config, "index")
    [aside, *_] = sorted(split_of(config, "test"))
    with (classes / "labels.csv").open("a") as file:
        file.write(f"{aside},{aside.partition('/')[0]}\n")
    with pytest.raises(ConfigError, match=rf"line 6: {aside} is in the test split; .*remove the line"):
        make(config, "labels")


def split_of(config, name):
    """The ids of a split."""
    table = read_index(flow(config)["index"].artifact(Store(config.output)), ["id", "split"])
    return [row["id"] for row in table.to_pylist() if row["split"] == name]


def test_a_source_with_its_own_test_images_lacks_only_validation(classes):
    (classes / "my flowers" / "train").mkdir()
    for name in ("rose", "tulip"):
        (classes / "my flowers" / name).rename(classes / "my flowers" / "train" / name)
        for number in range(5):
            draw(classes / "my flowers" / "test" / name / f"{number}.png")
    (classes / "labels.csv").write_text("id,label\ntrain/rose/0.png,rose\ntrain/tulip/0.png,tulip\n")
    path, *_ = write_config(str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml")
    data = load_config(path).data
    assert (data.validation, data.test) == (3, 0)  # a tenth of the other 38


def test_the_time_that_is_told_is_that_of_the_plan(classes, rates):
    images, labels = str(classes / "my flowers"), str(classes / "labels.csv")
    for minutes in (5, 50):
        path, _, time = write_config(images, labels, classes / f"{minutes}.yaml", minutes)
        planned = costs(load_config(path), {"train": 34, "validation": 3, "test": 3}, 2)
        total = START + total_seconds(planned, rates)
        assert total <= 60 * minutes
        assert time.startswith(f"about {duration(total)} on this machine")
        assert f"# Time:     {time}\n" in path.read_text()


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
    path, *_ = write_config(str(classes / "my flowers"), str(classes / "labels.csv"), classes / "c.yaml")
    tree = yaml.safe_load(path.read_text())
    assert list(tree)[:4] == ["name", "output", "data", "labels"]
    assert tree["data"]["keep_in_train"] == [str(classes / "c.kept.csv")]
    assert tree["labels"]["file"] == str(classes / "labels.csv")


@pytest.mark.parametrize(
    ("side", "gpu", "used"), [(20, False, False), (20, True, True), (300, False, False), (300, True, True)]
)
def test_gpus_are_used_where_there_are_some_and_named_for_large_images(
    tmp_path, monkeypatch, side, gpu, used
):
    monkeypatch.setattr(start, "has_gpu", lambda: gpu)
    for number in range(5):
        draw(tmp_path / "images" / f"{number}.png", side)
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    path, *_ = write_config(str(tmp_path / "images"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    compute = load_config(path).compute
    assert (compute.train_gpus, compute.actor_gpus) == ((True, 1) if used else (False, 0))
    assert ("compute: {train_gpus: true, actor_gpus: 1}" in path.read_text()) is (used or side == 300)


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


def test_folders_of_years_are_no_classes_where_the_list_names_others(tmp_path):
    for number in range(20):
        draw(tmp_path / "dated" / ("2021" if number % 2 else "2022") / f"{number}.png")
    (tmp_path / "labels.csv").write_text("id,label\n2022/0,cat \n2021/3,dog\n")
    path, found, _ = write_config(str(tmp_path / "dated"), str(tmp_path / "labels.csv"), tmp_path / "c.yaml")
    assert str(found).startswith("20 train images as folder; 2 labels of 2 classes (cat, dog); ")
    assert found.notes[0].startswith("note: no class of the list is one of the folders (2021, 2022), so ")
    config = load_config(path, [f"output={tmp_path}/out"])
    assert config.data.classes == ("cat", "dog") and (config.data.validation, config.data.test) == (0, 0)
    make(config, "labels")
    index = flow(config)["index"].artifact(Store(config.output))
    assert read_index(index)["label"].null_count == 20


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,oak, red", "line 2: more fields than the first line has; put a value that has a comma in quot"),
        ('0,"oak\n1,ash', "line 3: a value goes over several lines; close its quotation mark"),
        ("0,oak\n1,oak", "one class, oak; label images of at least two"),
    ],
)
def test_a_label_list_that_would_be_misread_is_refused(tmp_path, rows, said):
    for number in range(4):
        draw(tmp_path / "images" / f"{number}.png")
    (tmp_path / "labels.csv").write_text(f"id,label\n{rows}\n")
    with pytest.raises(ValueError, match=said):
        look(str(tmp_path / "images"), str(tmp_path / "labels.csv"))


def test_images_of_16_bits_are_told(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        values = np.full((20, 20), 20_000 + number, np.uint16)
        Image.fromarray(values).save(tmp_path / "images" / f"{number}.png")
    found = look(str(tmp_path / "images"), None)
    [note] = found.notes
    assert found.mode == "L" and note.startswith("note: some images have more than 8 bits a value, of which")


def test_images_without_any_to_train_on_are_refused(tmp_path):
    draw(tmp_path / "images" / "test" / "cat" / "0.png")
    with pytest.raises(ValueError, match="has no training images; name their split train"):
        look(str(tmp_path / "images"), None)


@pytest.mark.parametrize("side", [32, 300])
def test_a_learner_has_half_of_the_time(tmp_path, rates, side):
    for number in range(40):
        draw(tmp_path / "images" / f"{number}.png", side)
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    given = str(tmp_path / "images"), str(tmp_path / "labels.csv")
    path, *_ = write_config(*given, tmp_path / "c.yaml", 30, "freematch")
    config = load_config(path)
    assert (config.classifier.learner, config.labels_from) == ("freematch", "learner")
    section = config.semi_supervised
    assert section.views == ("small_images" if side == 32 else "photographs")
    assert section.learning_rate == pytest.approx((4e-3 if side == 32 else 1e-3) * 32 / 256)
    assert 40 * 100 // (32 * 5) <= section.steps <= 100  # 100 passes over the images, and at least 100 steps
    if side > 32:
        assert config.encoder.name == "vit_base_patch16_224.mae"
    assert {"learner", "learner_labels"} <= flow(config).keys()
    rest = load_config(write_config(*given, tmp_path / "d.yaml", 15)[0])
    assert config.diffusion.steps == rest.diffusion.steps


@pytest.mark.parametrize(
    ("learner", "side", "weight"), [("semi_vit", 32, 1.0), ("semi_vit", 300, None), ("freematch", 32, None)]
)
def test_the_unlabelled_images_weigh_less_where_a_small_network_labels_them(tmp_path, learner, side, weight):
    for number in range(40):
        draw(tmp_path / "images" / f"{number}.png", side)
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    given = str(tmp_path / "images"), str(tmp_path / "labels.csv")
    path, *_ = write_config(*given, tmp_path / "c.yaml", 30, learner)
    assert load_config(path).semi_supervised.unlabelled_weight == weight


def test_a_learner_has_fewer_steps_where_its_views_are_slow(tmp_path, monkeypatch):
    for number in range(400):
        draw(tmp_path / "images" / f"{number}.png", 32)
    (tmp_path / "labels.csv").write_text("id,label\n0,tulip\n3,rose\n")
    given = str(tmp_path / "images"), str(tmp_path / "labels.csv")
    steps = []
    for seconds in (0.0, 0.1):
        monkeypatch.setattr(start, "measure_view", lambda views, side, seconds=seconds: seconds)
        path, *_ = write_config(*given, tmp_path / f"{seconds}.yaml", 60, "freematch")
        steps.append(load_config(path).semi_supervised.steps)
    assert steps[1] < 0.5 * steps[0]


def test_a_learners_steps_fit_the_time(rates):
    images = Images(train=50_000, all=50_000, side=32, channels=3, classes=10)
    assert learner_training(images, 900.0, 0.5).steps == 1800
    whole = learner_training(images, None, 0.5)
    assert whole.steps == 31_000  # 100 x 50,000 / (32 x 5), in two digits
