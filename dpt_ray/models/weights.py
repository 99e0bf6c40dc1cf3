"""Weight files: read without running code, written as safetensors, loaded key by key.

Published checkpoints are often pickles (`.pth`, `.pth.tar`), which may run code when loaded. They
are read with `weights_only=True`, which admits tensors and plain containers only.
"""

import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpt_ray.store.artifact import local_copy
from dpt_ray.store.artifact import sha256 as sha256

PICKLE_SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt")
# The key of the weights in a checkpoint that holds other state too (Lightning and timm: state_dict;
# MAE, DeiT and Semi-ViT: model).
USUAL_SECTIONS = ("state_dict", "model")


def load_weights(path: str | Path, section: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors`, `.pth`, `.pt`, `.pth.tar` or `.ckpt` file by name.

    `section` selects one state dict of a checkpoint that holds several, such as MSN's
    `target_encoder`; it defaults to `state_dict` or `model` where the file has one. Raises ValueError
    naming the file for a pickle that contains code, a damaged file, or a missing section.
    """
    file = local_copy(path)
    content: object
    if file.name.endswith(".safetensors"):
        content = _load_safetensors(file, path)
    elif file.name.endswith(PICKLE_SUFFIXES):
        content = _load_pickle(file, path)
    else:
        raise ValueError(f"{path}: not a weight file; use .safetensors or {PICKLE_SUFFIXES}")
    return _state_dict(content, section, path)


def save_weights(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write one safetensors file atomically; equal tensors give equal bytes."""
    target = Path(path)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        partial = Path(scratch) / target.name
        save_file(contiguous, partial)
        partial.replace(target)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`.

    Raises ValueError naming `source` and the first few missing, unexpected and mismatched keys.
    """
    own = module.state_dict()
    missing = own.keys() - tensors.keys()
    unexpected = tensors.keys() - own.keys()
    mismatched = {
        f"{name} {tuple(tensors[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    }
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
    problems = [_first_few(kind, names) for kind, names in found if names]
    if problems:
        name = type(module).__name__
        raise ValueError(
            f"{source}: not the weights of this {name}: {'; '.join(problems)};"
            " give a checkpoint of this architecture"
        )
    module.load_state_dict(dict(tensors))


def _load_safetensors(file: Path, source: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(_unreadable(source, error)) from error


def _load_pickle(file: Path, source: str | Path) -> object:
    # Only the zip format (torch >= 1.6) can be memory-mapped; unused parts, such as an optimizer's
    # state, then stay on disk.
    mapped = zipfile.is_zipfile(file)
    if mapped:
        _check_stored(file, source)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{named[1]} in its pickle" if named else "not a pickle of torch's"
        raise ValueError(
            f"{source}: refused, since it contains more than tensors or is damaged ({what}): code in a"
            " pickle is never run; if you trust the file, convert it to .safetensors first"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise ValueError(_unreadable(source, error)) from error


def _check_stored(file: Path, source: str | Path) -> None:
    """Raise ValueError for a compressed part: torch writes none, and a few bytes may stand for any number."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(_unreadable(source, error)) from error
    if parts:
        raise ValueError(
            f"{source}: refused, since {parts[0]} in it is compressed, which torch never does; if you trust "
            "the file, convert it to .safetensors first"
        )


def _state_dict(content: object, section: str | None, source: str | Path) -> dict[str, Tensor]:
    """Return the flat dict of tensors under `section` (or a usual one) of a checkpoint's content."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{source}: contains a {type(content).__name__}; give a checkpoint with tensors by name"
        )
    sections = [name for name, value in content.items() if isinstance(value, Mapping)]
    if section is None:
        section = next((name for name in USUAL_SECTIONS if name in sections), None)
    elif section not in sections:
        raise ValueError(f"{source}: has no section {section!r}; it has {sections or 'none'}")
    tensors = content if section is None else content[section]
    strange = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange or not tensors:
        what = _first_few("entries that are not tensors", strange) if strange else "no weights"
        raise ValueError(f"{source}: contains {what}; name the section with the weights, one of {sections}")
    return dict(tensors)


def _unreadable(source: str | Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return f"{source}: cannot be read, damaged or cut short ({reason}); fetch it again"


def _first_few(kind: str, names: Iterable[str], count: int = 4) -> str:
    ordered = sorted(names)
    more = ", ..." if len(ordered) > count else ""
    return f"{len(ordered)} {kind} ({', '.join(ordered[:count])}{more})"
