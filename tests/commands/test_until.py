"""`dpt run --until`: it stops where it is told to, and says what comes next and its cost."""

import re
from types import SimpleNamespace

import pytest

from dpt_ray.cli import STAGES
from dpt_ray.commands import plan
from dpt_ray.commands.targets import TARGETS
from dpt_ray.config import load_config
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.lacking import remedy, unused_note
from dpt_ray.pipeline.speed import Rates
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.runs import quiet


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    """A machine of 1 GFLOP/s, so that nothing is measured."""
    monkeypatch.setattr(plan, "rates_for", lambda *_: Rates(1e9, 1e9, "cpu", 1e9))


def test_it_stops_after_the_stage_and_tells_the_cost_of_the_others(dpt, tmp_path):
    code, out, _ = dpt("run", DIGITS, f"output={tmp_path}", "generate_in=both", "--until", "labels")
    assert code == 0
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"index", "labels"}
    table = out[out.index("next: ") :]
    rows = [line.split("│")[1].strip() for line in table.splitlines() if line.count("│") > 2]
    assert rows[0] == "encoder" and "feature_denoiser" in rows and "total to do" in rows
    # 600 steps of 64 images, two views, forward and backward, by hand in tests/pipeline/test_cost.py.
    encoder = next(line for line in table.splitlines() if line.startswith("│ encoder"))
    assert "997" in encoder


def test_what_is_done_is_not_among_what_comes_next(dpt, tmp_path, monkeypatch):
    from dpt_ray.commands.plan import next_table
    from dpt_ray.pipeline.status import Status

    config = load_config(DIGITS, [f"output={tmp_path}"])
    dpt("run", DIGITS, f"output={tmp_path}", "--until", "index")
    real = plan.status

    def all_but(*missing):
        return lambda config: [
            row if row.name in missing else Status(row.name, row.artifact, "", row.manifest or {"units": []})
            for row in real(config)
        ]

    monkeypatch.setattr(plan, "status", all_but("samples", "report"))
    table = next_table(config)
    assert table.title == "next: samples"
    assert next(iter(table.columns[0].cells)) == "samples"
    monkeypatch.setattr(plan, "status", all_but())
    assert next_table(config) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "denoising",
            "--until: 'denoising' is not a stage of this configuration; its stages are index",
        ),
        ("pilot", "'pilot' is not a stage of this configuration; it comes with ladder={} generate_in=both;"),
        ("ladder", "'ladder' is not a stage of this configuration; it comes with ladder={}; its stages are"),
        ("train-diffusion", "; `dpt train-diffusion` makes denoiser: --until denoiser; its stages are index"),
        ("measure", "give its path as evaluate.inception; its stages are index"),
    ],
)
def test_an_unknown_stage_is_one_line_with_the_names(dpt, tmp_path, name, said):
    code, out, error = dpt("run", DIGITS, f"output={tmp_path}", "--until", name)
    assert code == 2 and out == "" and said in error and len(error.strip().splitlines()) == 1
    assert "evaluation, report" in error and not (tmp_path / "store").exists()


def test_extract_makes_the_features_alone_where_no_images_are_generated(monkeypatch):
    from dpt_ray.pipeline import run

    asked = []
    monkeypatch.setattr(run, "open_store", lambda config: Store("/nowhere"))
    monkeypatch.setattr(Store, "run_folder", lambda *_: SimpleNamespace(write_json=lambda *_: None))
    monkeypatch.setattr(run, "execute", lambda wanted, *_: asked.extend(node.name for node in wanted))
    monkeypatch.setattr(run, "link", lambda *_: None)
    config = load_config(DIGITS, ["generate_in=features"])
    run.run(config, quiet(), ["labels", "features", "moments"])
    assert asked == ["labels", "labels", "features"]


@pytest.mark.parametrize(
    ("command", "override", "said"),
    [
        ("ladder", "ladder=null", "no ladder stage: it comes with ladder={}"),
        ("measure", "evaluate.inception=null", "no image metrics stage: FID, "),
        (
            "retrain",
            "diffusion.condition=none",
            "no retrained stage: it comes with diffusion.condition=pseudo",
        ),
        ("sweep", "diffusion.condition=none", "no sweep stage: it comes with diffusion.condition=pseudo"),
        ("train-diffusion", "generate_in=features", "no images are generated: set generate_in=both"),
        ("generate", "generate_in=features", "with generate_in features no images are generated"),
    ],
)
def test_a_command_without_its_stage_says_which_setting_brings_it(dpt, tmp_path, command, override, said):
    code, _, error = dpt(command, DIGITS, f"output={tmp_path}", override)
    assert code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["evaluate.controls=false", "sweep=null"], "sweep"),
        (["evaluate.controls=false", "generate_in=features"], "augmented"),
        ([], "pilot"),
        ([], "propagation"),
        (["ladder.rungs=[tuned_probe]"], "propagation"),
        (["diffusion.condition=none"], "sweep"),
    ],
)
def test_the_setting_that_is_told_brings_the_stage(overrides, name):
    config = load_config(DIGITS, overrides)
    assert name not in flow(config)
    settings = re.split(r" (?=\w+=)", remedy(config, name).removeprefix("it comes with "))
    assert name in flow(load_config(DIGITS, [*overrides, *settings]))


def test_every_command_of_a_part_has_its_stages():
    assert {*STAGES, "generate"} == TARGETS.keys()


def test_settings_of_fid_without_its_network_are_told():
    def note(*overrides):
        return unused_note(load_config(DIGITS, overrides))

    given = ("evaluate.reference=a.npz", "evaluate.images=5")
    assert note(*given) == (
        "note: evaluate.reference evaluate.images of FID, which is not computed without evaluate.inception, "
        "change nothing"
    )
    assert note() == note(*given, "evaluate.inception=a.pth") == note(*given, "generate_in=features") == ""
