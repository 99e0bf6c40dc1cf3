"""The commands that the README shows are commands that exist, with settings that validate."""

import re
import shlex

import pytest
import yaml
from typer.main import get_command

from dpt_ray.cli import app
from dpt_ray.config import Config, load_config
from dpt_ray.config.study import load_study
from dpt_ray.config.yaml_file import build
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LINES = [line.partition(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
WRITTEN = "flowers.yaml"  # by the `dpt init /data/flowers` above it


def commands(program: str) -> list[list[str]]:
    return [shlex.split(line) for line in LINES if line.startswith(f"{program} ")]


@pytest.mark.parametrize("words", commands("dpt"), ids=" ".join)
def test_dpt_commands_parse(words):
    group = get_command(app)
    command = group.commands[words[1]]
    arguments = command.make_context(words[1], words[2:]).params
    config = arguments.get("config")
    if config and str(config) != WRITTEN:
        overrides = arguments.get("overrides") or []
        load = load_study if words[1] == "study" else load_config
        load(ROOT / config, overrides)


def test_every_command_of_the_readme_is_shown():
    assert {words[1] for words in commands("dpt")} >= {"run", "plan", "status", "study", "predict", "export"}


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_targets_exist(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_submitted_run_is_a_valid_configuration():
    [words] = [words for words in commands("dpt") if words[1] == "submit"]
    load_config(ROOT / words[2], [word for word in words[3:] if "=" in word])


def test_the_example_for_own_images_is_a_valid_configuration():
    [example] = [yaml.safe_load(block) for block in BLOCKS if block.startswith("data:")]
    tree = yaml.safe_load((ROOT / "configs/digits.yaml").read_text()) | example
    tree["diffusion"]["learning_rate"] = tree["pretrain"]["learning_rate"] = 2.0e-3
    tree["evaluate"]["referee"]["learning_rate"] = 2.0e-3
    build(Config, tree, "README.md")
