"""The commands that the README and docs/ show are commands that exist, with settings that validate."""

import re
import shlex

import pytest
import yaml
from typer.main import get_command

from dpt_ray.cli import STAGES, app
from dpt_ray.config import Config, load_config
from dpt_ray.config.study import load_study
from dpt_ray.config.yaml_file import build
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    path.name: re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE) for path in PAGES
}
# Files that stand for the reader's own; the first is written by the `dpt init /data/flowers` above it.
WRITTEN = ("flowers.yaml", "CONFIG")


def commands(program: str, *pages: str) -> list[list[str]]:
    """The commands in the blocks of some pages, by default of all."""
    blocks = [block for page in pages or BLOCKS for block in BLOCKS[page]]
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith(f"{program} ")]
    return list(map(list, dict.fromkeys(map(tuple, found))))


@pytest.mark.parametrize("words", commands("dpt"), ids=" ".join)
def test_dpt_commands_parse(words):
    group = get_command(app)
    command = group.commands[words[1]]
    arguments = command.make_context(words[1], words[2:]).params
    config = arguments.get("config")
    if config and str(config) not in WRITTEN:
        overrides = arguments.get("overrides") or []
        load = load_study if words[1] == "study" else load_config
        load(ROOT / config, overrides)


def test_every_command_is_shown():
    shown = {words[1] for words in commands("dpt")}
    stages = {name for name in get_command(app).commands if name in STAGES}
    assert shown >= get_command(app).commands.keys() - stages
    assert {"init", "plan", "run", "predict", "submit"} <= {
        words[1] for words in commands("dpt", "README.md")
    }


@pytest.mark.parametrize("words", commands("make"), ids=" ".join)
def test_make_targets_exist(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_submitted_run_is_a_valid_configuration():
    [words] = [words for words in commands("dpt", "README.md") if words[1] == "submit"]
    load_config(ROOT / words[2], [word for word in words[3:] if "=" in word])


def test_the_example_for_own_images_is_a_valid_configuration():
    [example] = [yaml.safe_load(block) for block in BLOCKS["own_images.md"] if block.startswith("data:")]
    tree = yaml.safe_load((ROOT / "configs/digits.yaml").read_text()) | example
    tree["diffusion"]["learning_rate"] = tree["pretrain"]["learning_rate"] = 2.0e-3
    tree["evaluate"]["referee"]["learning_rate"] = 2.0e-3
    build(Config, tree, "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_within_the_project_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not gone
