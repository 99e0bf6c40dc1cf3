"""A YAML file with overrides as checked settings; what is wrong with it is one line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

T = TypeVar("T", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration or an input that cannot be run: one line with the key, the value, the remedy."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 2e-4 as a number, which YAML 1.1 reads as text, and refuses a repeated key."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the node of a mapping. Raises YAMLError for a key that it has twice: one would be lost."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and name in lines:
                raise yaml.YAMLError(f"line {line} repeats the key {key.value!r} of line {lines[name]}")
            lines[name] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, merged over the file of its `base` key (a relative path), if any."""
    merged: dict[str, Any] = {}
    for _, tree in reversed(_chain(Path(path))):
        merged = merge(merged, tree)
    return merged


def files_of(path: str | Path) -> list[Path]:
    """Return a YAML file and those below it by `base`. Raises ConfigError where one cannot be read."""
    return [file for file, _ in _chain(Path(path))]


def _chain(path: Path, over: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Return a file and its mapping, then those below it; `over` are the files that led here by `base`."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {_one_line(error)}; correct it") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections")
    if "base" not in tree:
        return [(path, tree)]
    base = path.parent / str(tree.pop("base"))
    over = (*over, path.resolve())
    if base.resolve() in over:
        raise ConfigError(f"{path}: `base` is circular: {base} is already in the chain; remove one `base`")
    return [(path, tree), *_chain(base, over)]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `over`: mappings are merged by key, null restores the default."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return `["a.b=1"]` as `{"a": {"b": 1}}`; values are YAML."""
    tree: dict[str, Any] = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"override {override!r}: write key.path=value")
        try:
            node: Any = yaml.load(value, Loader=_Loader) if value else None
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {value!r} is not YAML: {_one_line(error)}; correct it") from None
        for part in reversed(key.split(".")):
            node = {part: node}
        tree = merge(tree, node)
    return tree


def build(model: type[T], tree: dict[str, Any], source: str) -> T:
    """Return `model` from plain data. Raises a one-line ConfigError for the first problem."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(model, tree, error)}") from None


def to_yaml(config: BaseModel) -> str:
    """Return the resolved configuration as YAML, a valid input itself."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _explain(model: type[BaseModel], tree: dict[str, Any], error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    path = _path(tree, first)
    key = ".".join(path)
    match first["type"]:
        case "extra_forbidden":
            shown = reprlib.repr(first["input"])
            return f"{key}: {shown}: unknown key; {_nearest(path, _keys(model, path[:-1]))}"
        case "missing":
            return f"{key}: missing; add it"
        case "value_error":
            return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    # Each member of a union says for itself what it expected: together they are what is allowed.
    expected = [_expected(model, path, problem) for problem in problems if _path(tree, problem) == path]
    message = " or ".join([expected[0], *(text.removeprefix("Input should be ") for text in expected[1:])])
    if first["type"] == "tuple_type" and len(expected) == 1 and isinstance(first["input"], str | int | float):
        message += f"; write [{first['input']}]"
    where = f"{key}: " if key else ""
    return f"{where}{reprlib.repr(first['input'])}: {message[0].lower()}{message[1:]}"


def _expected(model: type[BaseModel], path: list[str], problem: Any) -> str:
    """Return what a value should be, in YAML's words."""
    if problem["type"] == "model_type":
        return f"Input should be a section with keys {', '.join(_keys(model, path))}"
    if problem["type"] == "string_type":
        return f"{problem['msg']}; put it in quotation marks"
    return str(problem["msg"]).replace("tuple", "list").replace("dictionary", "mapping")


def _path(tree: Any, problem: Any) -> list[str]:
    """Return the keys of a problem, without pydantic's names of union members."""
    path: list[str] = []
    for part in problem["loc"]:
        if isinstance(tree, dict):
            written = part in tree
        else:
            written = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if not written and problem["type"] != "missing":
            break
        path.append(str(part))
        tree = tree[part] if written else None
    return path


def _nearest(path: list[str], allowed: list[str]) -> str:
    near = difflib.get_close_matches(path[-1], allowed, n=1, cutoff=0.5)
    if near:
        return f"did you mean {'.'.join([*path[:-1], near[0]])}?"
    return f"remove it, or use one of {', '.join(allowed)}"


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys allowed at `path` below `model`."""
    for part in path:
        if part in model.model_fields:  # else a place in a list or a key of sections, each of one kind
            model = next(_sections(model.model_fields[part].annotation))
    return list(model.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a value may be, or be made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
