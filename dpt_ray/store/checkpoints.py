"""Checkpoints in an artifact's folder: published atomically; the newest two are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from dpt_ray.store.artifact import Artifact, local_copy
from dpt_ray.store.cache import remove_family
from dpt_ray.store.records import CheckpointMeta

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINTS = "checkpoints"
KEPT_CHECKPOINTS = 2


def save_checkpoint(out: Artifact, step: int, tensors: dict[str, Tensor], meta: CheckpointMeta) -> None:
    """Publish a checkpoint (tensors first, then its JSON) and remove all but the newest two.

    An artifact has one writer, so unfinished files are those of a killed one; they are removed.
    """
    from safetensors.torch import save_file

    _remove_torn(out)
    name = f"{CHECKPOINTS}/{step:09d}"
    with out.writing(f"{name}.safetensors") as path:
        save_file(tensors, path)
    out.write_json(f"{name}.json", meta)
    for old in checkpoint_names(out)[:-KEPT_CHECKPOINTS]:
        out.fs.rm_file(out.path(f"{CHECKPOINTS}/{old}.json"))
        out.fs.rm_file(out.path(f"{CHECKPOINTS}/{old}.safetensors"))


def check_room(out: Artifact, model: nn.Module) -> None:
    """Raise ValueError where the disk has no room for the checkpoints of a model's training.

    Unfinished files of a killed writer are removed first.
    """
    _remove_torn(out)
    # The kept checkpoints and the one being written, each with weights, EMA and Adam's two moments.
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    present = sum(
        out.fs.size(out.path(f"{CHECKPOINTS}/{name}.safetensors")) for name in checkpoint_names(out)
    )
    out.check_room((KEPT_CHECKPOINTS + 1) * 4 * weights - present)


def load_checkpoint(out: Artifact) -> tuple[dict[str, Tensor], CheckpointMeta] | None:
    """Return the newest complete checkpoint, tensors and JSON, None where there is none."""
    from safetensors.torch import load_file

    names = checkpoint_names(out)
    if not names:
        return None
    name = f"{CHECKPOINTS}/{names[-1]}"
    family = out.file_uri(CHECKPOINTS)
    copy = local_copy(out.file_uri(f"{name}.safetensors"), family)
    tensors = load_file(copy)
    remove_family(family, but=copy)  # the other workers of this node load this one too
    return tensors, cast(CheckpointMeta, out.read_json(f"{name}.json"))


def remove_copies(out: Artifact) -> None:
    """Remove this node's copies of a remote store's checkpoints, once all its workers have loaded them."""
    remove_family(out.file_uri(CHECKPOINTS))


def _remove_torn(out: Artifact) -> None:
    """Remove files under temporary names, tensors without JSON and JSON without tensors."""
    whole = checkpoint_names(out)
    for file in _files(out):
        if file.name.startswith(".nfs"):  # NFS's name of a removed file that a process still has open
            continue
        if file.name.startswith(".") or file.stem not in whole:
            out.fs.rm_file(out.path(f"{CHECKPOINTS}/{file.name}"))


def checkpoint_names(out: Artifact) -> list[str]:
    """Return the names (zero-padded steps) of the complete checkpoints, oldest first.

    JSON alone is no checkpoint: a writer that has lost its lease may publish it after the next one has
    removed the tensors.
    """
    files = {file.name for file in _files(out)}
    found = (Path(name).stem for name in files if name.endswith(".json"))
    return sorted(name for name in found if f"{name}.safetensors" in files)


def _files(out: Artifact) -> list[Path]:
    files = out.fs.ls(out.path(CHECKPOINTS), detail=False) if out.exists(CHECKPOINTS) else []
    return list(map(Path, files))
