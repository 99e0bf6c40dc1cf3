"""Weight files: read without running code, written as safetensors, loaded key by key.

Published checkpoints of the methods are pickles (`.pth`, `.pth.tar`), and a pickle may run code when
it is opened. Everything here reads them with `weights_only=True`, so that only tensors and plain
containers get through.
"""

import hashlib
import json
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpt_ray.store.artifact import local_copy
from dpt_ray.store.artifact import sha256 as sha256

PICKLE_SUFFIXES = (".pth", ".pt", ".pth.tar", ".ckpt")
# Where training frameworks put the weights in a checkpoint that also holds other state
# (Lightning and timm: state_dict; MAE, DeiT and Semi-ViT: model).
USUAL_SECTIONS = ("state_dict", "model")


def module_sha256(module: nn.Module, settings: Mapping[str, Any]) -> str:
    """SHA-256 of a module's weights and of the settings that shape its output, in hexadecimal.

    The same weights give the same value whichever file format they came from. `settings` holds what
    JSON can write.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(path: str | Path, section: str | None = None) -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors`, `.pth`, `.pt`, `.pth.tar` or `.ckpt` file.

    `section` picks one state dict out of a checkpoint that holds several, such as MSN's
    `target_encoder`; without it `state_dict` or `model` is used where the file has one. Raises
    ValueError naming the file for a pickle with code in it, a damaged file, or a missing section.
    """
    file = local_copy(path)
    if file.name.endswith(".safetensors"):
        content: Any = _load_safetensors(file, path)
    elif file.name.endswith(PICKLE_SUFFIXES):
        content = _load_pickle(file, path)
    else:
        raise ValueError(f"{path}: not a weight file; use .safetensors or {PICKLE_SUFFIXES}")
    return _state_dict(content, section, path)


def save_weights(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors as one safetensors file, whole or not at all; equal tensors, equal bytes."""
    target = Path(path)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        partial = Path(scratch) / target.name
        save_file(contiguous, partial)
        partial.replace(target)


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`; names and shapes must agree exactly.

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
            " give the checkpoint of this very architecture"
        )
    module.load_state_dict(dict(tensors))


def _load_safetensors(file: Path, source: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(_unreadable(source, error)) from error


def _load_pickle(file: Path, source: str | Path) -> Any:
    # Only the zip format (torch >= 1.6) can be mapped; mapping leaves what is not used, such as an
    # optimizer's state, on the disk.
    mapped = zipfile.is_zipfile(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{named[1]} in its pickle" if named else "its pickle is none of torch's"
        raise ValueError(
            f"{source}: refused, as it holds more than tensors or is damaged ({what}): code in a"
            " pickle is never run; where you trust the file, convert it to .safetensors first"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, struct.error) as error:
        raise ValueError(_unreadable(source, error)) from error


def _state_dict(content: Any, section: str | None, source: str | Path) -> dict[str, Tensor]:
    """The one flat dict of tensors that `section` (or custom) names in a checkpoint's content."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: holds a {type(content).__name__}, not tensors by name")
    sections = [name for name, value in content.items() if isinstance(value, Mapping)]
    if section is None:
        section = next((name for name in USUAL_SECTIONS if name in sections), None)
    elif section not in sections:
        raise ValueError(f"{source}: has no section {section!r}; it has {sections or 'none'}")
    tensors = content if section is None else content[section]
    strange = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange or not tensors:
        what = _first_few("that are no tensors", strange) if strange else "no weights"
        raise ValueError(f"{source}: holds {what}; name the section with the weights, one of {sections}")
    return dict(tensors)


def _unreadable(source: str | Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return f"{source}: cannot be read, damaged or cut short ({reason}); fetch it again"


def _first_few(kind: str, names: Iterable[str], count: int = 4) -> str:
    ordered = sorted(names)
    more = ", ..." if len(ordered) > count else ""
    return f"{len(ordered)} {kind} ({', '.join(ordered[:count])}{more})"
