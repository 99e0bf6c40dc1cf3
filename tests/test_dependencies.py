"""The dependencies in pyproject.toml are those that the package imports."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Declared for what they register, without an import of their own: fsspec opens hf:// with it.
PLUGINS = {"huggingface-hub"}


def normalised(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_modules():
    """The top-level modules that the package imports, in functions too, with one file that does."""
    for path in (ROOT / "dpt_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0], path.name


def names(entries):
    return {normalised(re.split(r"[\[<>=!~; ]", entry)[0]) for entry in entries}


def test_declared_dependencies_are_the_imported_ones():
    declared, extras = names(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    optional = names(entry for extra, entries in extras.items() if extra != "dev" for entry in entries)
    installed = packages_distributions()
    modules = {name: file for name, file in imported_modules() if name not in sys.stdlib_module_names}
    imported = {normalised(installed[name][0]): file for name, file in modules.items() if name != "dpt_ray"}
    assert {name: file for name, file in imported.items() if name not in declared | optional} == {}
    assert declared - imported.keys() == PLUGINS


def test_declared_dependencies_have_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if "==" in line}
    entries = [
        *PROJECT["dependencies"],
        *(e for extra in PROJECT["optional-dependencies"].values() for e in extra),
    ]
    assert names(entries) - pinned == set()


def test_the_citation_names_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == version("dpt_ray")
    assert citation["license"] == PROJECT["license"]
