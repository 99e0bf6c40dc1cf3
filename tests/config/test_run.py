"""A run's YAML: what is accepted, what it becomes, and how each mistake is told in one line."""

import pytest
import yaml
from pydantic import ValidationError

from dpt_ray.config import Config, ConfigError, load_config, to_yaml
from dpt_ray.config.study import load_study
from dpt_ray.config.yaml_file import build, read_yaml
from tests.helpers.paths import CONFIGS, DIGITS


def write(folder, file="run.yaml", /, **changes):
    path = folder / file
    path.write_text(yaml.safe_dump(changes))
    return path


def message(path, *overrides):
    """The one line that a bad configuration ends in."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text
    return text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_in_the_repository_is_valid(path):
    if "study" in read_yaml(path):
        study, runs = load_study(path)
        repeats = len(study.labels_per_class) * len(study.encoder_seeds) * study.draws
        labelled = repeats * (1 + len(study.variants))
        assert len(runs) == labelled + len(study.references) * len(study.encoder_seeds)
    else:
        assert load_config(path).name


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("generate.gidance=2", ["generate.gidance: 2: unknown key", "did you mean generate.guidance?"]),
        ("diffusion.model.detph=4", ["diffusion.model.detph: 4", "did you mean diffusion.model.depth?"]),
        ("evaluate.referee.step=1", ["evaluate.referee.step: 1", "did you mean evaluate.referee.steps?"]),
        ("genrate.nfe=3", ["genrate", "did you mean generate?"]),
        ("generate.zzz=1", ["generate.zzz: 1: unknown key; remove it", "images_per_class", "nfe"]),
        ("zzz=", ["zzz: None: unknown key"]),
        ("pretrain.steps=many", ["pretrain.steps: 'many'", "valid integer"]),
        ("pretrain.steps=1.5", ["pretrain.steps: 1.5", "valid integer"]),
        ("pretrain.steps=true", ["pretrain.steps: True", "valid integer"]),
        ("pretrain.steps='20'", ["pretrain.steps: '20'", "valid integer"]),
        ("pretrain.steps=0", ["pretrain.steps: 0", "greater than or equal to 1"]),
        ("name=3", ["name: 3", "valid string; put it in quotation marks"]),
        ("sweep.l2=[0.1, 0.2, 0.1]", ["sweep.l2: ", "[0.1, 0.2, 0.1] has 0.1 twice; leave one out"]),
        ("sweep.images_per_class=[16, 16]", ["sweep.images_per_class: ", "has 16 twice"]),
        ("name=a/b", ["name: 'a/b'"]),
        ("diffusion=[]", ["diffusion: []", "should be a section with keys steps, batch_size, "]),
        ("labels=2", ["labels: 2: input should be a section with keys per_class, seed, file, format"]),
        ("sweep.generate=[3]", ["sweep.generate.0: 3: ", "a section with keys guidance, guidance_interval"]),
        ("data.splits=2", ["data.splits: 2: ", "valid mapping"]),
        ("ladder.rungs=propagation", ["'propagation': input should be a valid list; write [propagation]"]),
        (
            "study={draws: 2}",
            [f"study: describes a study of several runs; make them with `dpt study {DIGITS}`"],
        ),
        ("generate={nfe: 1, nfe: 2}", ["line 1 repeats the key 'nfe' of line 1"]),
        ("diffusion.schedule=vpp", ["diffusion.schedule: 'vpp'", "'vp'", "'cosine'"]),
        ("diffusion.learning_rate=.nan", ["diffusion.learning_rate: nan", "finite"]),
        ("diffusion.learning_rate=.inf", ["diffusion.learning_rate: inf", "finite"]),
        ("diffusion.betas=[0.9]", ["diffusion.betas.1: missing"]),
        ("diffusion.betas=[0.9, 2]", ["diffusion.betas.1: 2", "less than 1"]),
        ("sweep.images_per_class=[16, x]", ["sweep.images_per_class.1: 'x'", "valid integer"]),
        ("sweep.images_per_class=16", ["sweep.images_per_class: 16", "valid list"]),
        ("diffusion.steps=", ["diffusion.steps: missing; add it"]),
        ("data=", ["data: missing; add it"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_is_allowed(override, parts):
    text = message(DIGITS, override)
    assert text.startswith(f"{DIGITS}: ") or "is not YAML" in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("value", ["foo", "[1]", "{a: 1}", "-1"])
def test_a_value_of_two_types_is_told_by_its_own_key_and_all_that_is_allowed(value):
    text = message(DIGITS, f"retrain.real_weight={value}")
    assert f": retrain.real_weight: {yaml.safe_load(value)!r}: " in text
    assert text.endswith(" or 'balanced'")


def test_an_item_of_two_types_is_told_by_its_place():
    assert ": sweep.real_weight.1: 'foo': " in message(DIGITS, "sweep.real_weight=[1, foo]")


def test_a_missing_section_is_named(tmp_path):
    assert "data: missing; add it" in message(write(tmp_path, name="run"))


def test_names_of_splits_are_compared_in_small_letters():
    data = "data={source: folder, uri: a, splits: {Val: test}}"
    assert load_config(DIGITS, [data]).data.splits == {"val": "test"}


@pytest.mark.parametrize("given", [[], ["labels_from=null"]])
def test_a_learners_labels_are_the_default_where_there_is_one(given):
    own = "semi_supervised={steps: 5, batch_size: 16, learning_rate: 1e-3}"
    assert load_config(DIGITS, ["classifier.learner=freematch", own, *given]).labels_from == "learner"
    assert load_config(DIGITS, given).labels_from == "probe"


def test_a_study_of_features_has_no_denoiser_to_refer_to(tmp_path):
    section = {"labels_per_class": [1], "encoder_seeds": [0], "draws": 1, "references": ["none"]}
    path = write(tmp_path, base=str(DIGITS), name="s", study=section, generate_in="features")
    with pytest.raises(ConfigError, match=r"study\.references: \['none'\] are denoisers of images.*both"):
        load_study(path)


def test_overrides_win_over_the_file_and_leave_the_rest():
    config = load_config(DIGITS, ["generate.nfe=7", "sweep.l2=[0.1, 1]", "compute.train_workers=0"])
    assert (config.generate.nfe, config.sweep.l2, config.compute.train_workers) == (7, (0.1, 1.0), 0)
    assert config.generate.images_per_class == 128
    assert config.compute.actors == 2


def study(folder, **variants):
    section = {"labels_per_class": [1], "encoder_seeds": [4], "draws": 2, "variants": variants}
    return write(folder, base=str(DIGITS), name="s", study=section)


def test_a_variant_of_a_study_is_the_base_but_for_what_it_names(tmp_path):
    path = study(tmp_path, wide={"diffusion": {"model": {"dim": 128}}})
    runs = load_study(path)[1]
    assert list(runs) == ["s-n1-e4-d0", "s-wide-n1-e4-d0", "s-n1-e4-d1", "s-wide-n1-e4-d1"]
    for draw in range(2):
        base, wide = (runs[f"s{variant}-n1-e4-d{draw}"].model_dump() for variant in ("", "-wide"))
        assert base["labels"]["seed"] == base["diffusion"]["seed"] == 4000 + draw
        assert (base["name"], wide["name"]) == (f"s-n1-e4-d{draw}", f"s-wide-n1-e4-d{draw}")
        assert (base["diffusion"]["model"].pop("dim"), wide["diffusion"]["model"].pop("dim")) == (64, 128)
        assert base | {"name": ""} == wide | {"name": ""}


@pytest.mark.parametrize("name", ["name=null", "name=study"])
def test_a_study_whose_name_is_null_has_the_default_name(tmp_path, name):
    assert list(load_study(study(tmp_path), [name])[1]) == ["study-n1-e4-d0", "study-n1-e4-d1"]


def test_every_training_of_a_draw_has_a_seed_of_its_own(tmp_path):
    own = {
        "classifier": {"learner": "freematch"},
        "semi_supervised": {"steps": 5, "batch_size": 8, "group": 8, "learning_rate": 1e-3},
        "student": {"width": 8, "dim": 8, "steps": 5, "batch_size": 8, "learning_rate": 1e-3},
        "generate_in": "both",
    }
    section = {"labels_per_class": [1], "encoder_seeds": [4], "draws": 2}
    runs = load_study(write(tmp_path, base=str(DIGITS), name="s", study=section, **own))[1].values()
    names = ("labels", "diffusion", "generate", "feature_diffusion", "semi_supervised", "student")
    for draw, run in enumerate(runs):
        assert {name: getattr(run, name).seed for name in names} == dict.fromkeys(names, 4000 + draw)
        assert run.pretrain.seed == 4


def test_a_study_with_an_encoder_seed_listed_twice_is_refused(tmp_path):
    section = {"labels_per_class": [1], "encoder_seeds": [4, 4], "draws": 2}
    with pytest.raises(ConfigError, match=r"study: encoder_seeds: .* has 4 twice; leave one out$"):
        load_study(write(tmp_path, base=str(DIGITS), name="s", study=section))


def test_a_variant_that_is_null_is_left_out(tmp_path):
    path = study(tmp_path, wide={"diffusion": {}}, deep={"diffusion": {}})
    found, runs = load_study(path, ["study.variants.wide=null"])
    assert list(found.variants) == ["deep"]
    assert list(runs) == ["s-n1-e4-d0", "s-deep-n1-e4-d0", "s-n1-e4-d1", "s-deep-n1-e4-d1"]


@pytest.mark.parametrize(
    ("variants", "part"),
    [
        (
            {"a": {"difusion": {}}},
            "study: variants change difusion, which is not a section of a run; remove it",
        ),
        ({"a": {"name": "x"}}, "study: variants change name, which the study gives its runs; remove it"),
        ({"A b": {}}, "study: variants"),
        ({"a": {"diffusion": {"dim": 3}}}, "s-a-n1-e4-d0: diffusion.dim: 3: unknown key"),
    ],
)
def test_a_wrong_variant_is_named(tmp_path, variants, part):
    with pytest.raises(ConfigError) as caught:
        load_study(study(tmp_path, **variants))
    assert part in str(caught.value) and "\n" not in str(caught.value)


def published(folder, **study):
    base = str(CONFIGS / "imagenet256_msn_b4_1label.yaml")
    section = {"labels_per_class": [1], "encoder_seeds": [4], "draws": 2} | study
    return write(folder, base=base, name="s", study=section)


def test_a_study_of_a_published_encoder_has_draws_alone(tmp_path):
    runs = load_study(published(tmp_path), ["labels.file=null"])[1]
    assert list(runs) == ["s-n1-e4-d0", "s-n1-e4-d1"]
    for draw, run in enumerate(runs.values()):
        assert (run.encoder.kind, run.pretrain, run.labels.file) == ("msn", None, None)
        assert (run.labels.per_class, run.labels.seed, run.diffusion.seed) == (1, 4000 + draw, 4000 + draw)


@pytest.mark.parametrize(
    ("changes", "overrides", "parts"),
    [
        ({}, [], ["labels.file: 'labels/imagenet_subsets1/1imgs_class.txt'", "labels.file=null"]),
        (
            {"encoder_seeds": [0, 1]},
            ["labels.file=null"],
            ["study.encoder_seeds: [0, 1]: encoder.kind msn", "give one seed"],
        ),
    ],
)
def test_a_study_that_cannot_repeat_its_base_says_which_setting_is_in_the_way(
    tmp_path, changes, overrides, parts
):
    with pytest.raises(ConfigError) as caught:
        load_study(published(tmp_path, **changes), overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", ".a=1"])
def test_an_override_that_is_not_key_and_value_is_quoted(override):
    assert message(DIGITS, override) == f"override {override!r}: write key.path=value"


def test_an_override_that_is_not_yaml_names_its_key():
    assert message(DIGITS, "sweep.l2=[1").startswith("sweep.l2: '[1' is not YAML")


def test_null_brings_back_the_default():
    assert load_config(DIGITS).generate.nfe == 10
    assert load_config(DIGITS, ["generate.nfe=null"]).generate.nfe == 25
    assert load_config(DIGITS, ["sweep="]).sweep is None
    assert load_config(DIGITS, ["compute=null"]).compute.actors == 1
    listed = load_config(DIGITS, ["labels.per_class=null", "labels.file=few.csv"])
    assert listed.labels.file == "few.csv"


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.2e-3", "+2e-4", ".2e-3", "2.e-4", "0.0002"])
def test_numbers_in_every_usual_notation_are_numbers(text):
    assert load_config(DIGITS, [f"diffusion.learning_rate={text}"]).diffusion.learning_rate == 0.0002


def test_a_whole_number_is_a_valid_weight():
    assert load_config(DIGITS, ["retrain.real_weight=3"]).retrain.real_weight == 3.0
    assert load_config(DIGITS, ["retrain.real_weight=balanced"]).retrain.real_weight == "balanced"


def test_a_file_is_laid_over_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    base = read_yaml(DIGITS) | {"name": "bottom"}
    write(tmp_path, "bottom.yaml", **base)
    write(tmp_path, "middle.yaml", base="bottom.yaml", generate={"nfe": 9, "seed": 4})
    top = write(tmp_path / "sub", base="../middle.yaml", name="top", generate={"nfe": 5}, sweep=None)
    config = load_config(top, ["labels.seed=8"])
    assert (config.name, config.generate.nfe, config.generate.seed) == ("top", 5, 4)
    assert (config.labels.seed, config.generate.images_per_class, config.sweep) == (8, 128, None)


def test_a_base_that_is_not_there_or_goes_round_is_named(tmp_path):
    assert "gone.yaml: no such file" in message(write(tmp_path, base="gone.yaml"))
    one = write(tmp_path, "one.yaml", base="two.yaml")
    write(tmp_path, "two.yaml", base="one.yaml")
    assert "`base` is circular" in message(one)


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"a: [1", "not YAML"), (b"a: b: c", "not YAML"), (b"\xff\xfe\x00", "not YAML"), (b"- 1", "mapping")],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path, content, part):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = message(path)
    assert text.startswith(f"{path}: ") and part in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: a\nlabels: {}\nname: b\n", "line 3 repeats the key 'name' of line 1; correct it"),
        ("generate:\n  nfe: 1\n  'nfe': 2\n", "line 3 repeats the key 'nfe' of line 2; correct it"),
    ],
)
def test_a_repeated_key_is_refused_with_its_lines(tmp_path, content, said):
    (tmp_path / "twice.yaml").write_text(content)
    assert message(tmp_path / "twice.yaml") == f"{tmp_path}/twice.yaml: not YAML: {said}"


def test_a_merged_mapping_may_have_its_keys_again(tmp_path):
    (tmp_path / "merged.yaml").write_text("a: &a {nfe: 1, seed: 2}\nb: {<<: *a, nfe: 3}\n")
    assert read_yaml(tmp_path / "merged.yaml")["b"] == {"nfe": 3, "seed": 2}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert message(tmp_path / "none.yaml").startswith(f"{tmp_path / 'none.yaml'}: no such file")
    assert message(tmp_path).startswith(f"{tmp_path}: cannot be read")


@pytest.mark.parametrize("overrides", [[], ["sweep=", "retrain.real_weight=balanced", "pretrain.seed=3"]])
def test_the_resolved_configuration_is_a_valid_input_that_gives_the_same_run(tmp_path, overrides):
    config = load_config(DIGITS, [*overrides, "diffusion.learning_rate=1e-7"])
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    again = load_config(path)
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_a_configuration_cannot_be_changed():
    config = load_config(DIGITS)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValidationError, match="frozen"):
        config.diffusion.model.depth = 2
    assert isinstance(config.sweep.images_per_class, tuple)


def test_building_from_plain_data_names_its_source():
    with pytest.raises(ConfigError, match=r"^notebook: data: missing; add it$"):
        build(Config, {"name": "x"}, "notebook")
