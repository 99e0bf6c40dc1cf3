"""U-ViT checkpoints as their authors publish them: a folder with `nnet_ema.pth`, a raw state dict.

The checkpoint has no settings; all but the number of heads follow from the tensors' shapes.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor

from dpt_ray.models.uvit import UViT, UViTConfig
from dpt_ray.models.weights import load_strict, load_weights
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.filesystem import url_to_fs

EMA_FILE = "nnet_ema.pth"
RAW_FILE = "nnet.pth"
# dim -> heads of the published sizes (S, M, L, H); the heads of dim 1152 are not 64 wide.
PUBLISHED_HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}
LABEL_EMBEDDING = "label_emb.weight"
# The tensors that determine the sizes, with their number of axes.
_TELLING = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "in_blocks.0.mlp.fc1.weight": 2,
}


def load_published_uvit(path: str | Path, heads: int | None = None) -> UViT:
    """Return the network of a published checkpoint, on the CPU in float32.

    `path` is the checkpoint's folder (its EMA weights, else `nnet.pth`) or a file, local or a URI.
    `heads` is required for a dim that is not a published size. Raises ValueError naming the path for a
    file that is missing, damaged, contains more than tensors, or is of another architecture.
    """
    file = _weight_file(path)
    return published_uvit(load_weights(file), file, heads)


def published_uvit(tensors: Mapping[str, Tensor], source: str | Path, heads: int | None = None) -> UViT:
    """Return the network with weights `tensors`, under the published names.

    Raises ValueError naming `source` and the keys that are missing, unexpected or of another shape.
    """
    config = published_config(tensors, source, heads)
    with torch.device("meta"):  # initial weights would be overwritten
        model = UViT(config)
    model.to_empty(device="cpu")
    load_strict(model, tensors, source)
    return model


def published_config(
    tensors: Mapping[str, Tensor], source: str | Path, heads: int | None = None
) -> UViTConfig:
    """Return the architecture that follows from the shapes of published weights.

    A network without a label embedding is unconditional (num_classes = -1 in the public code; only the
    time token precedes the patches). The last row of a label embedding is taken to be the null class
    (classifier-free guidance), which published networks without guidance (64 pixels) lack. Raises
    ValueError naming `source` where the tensors are not a U-ViT's or the number of heads is unknown.
    """
    strange = [name for name, axes in _TELLING.items() if name not in tensors or tensors[name].ndim != axes]
    if strange:
        raise ValueError(
            f"{source}: not a U-ViT: {', '.join(strange)} missing or of another "
            "rank; give the network's weights as published, nnet_ema.pth or nnet.pth"
        )
    dim, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    rows = tensors[LABEL_EMBEDDING].shape[0] if LABEL_EMBEDDING in tensors else 0
    if rows == 1:
        raise ValueError(
            f"{source}: {LABEL_EMBEDDING} has the null class alone; give a network with classes or without"
        )
    extra_tokens = 2 if rows else 1  # label and time
    patches = tensors["pos_embed"].shape[1] - extra_tokens
    side = math.isqrt(max(patches, 0))
    if side**2 != patches:
        raise ValueError(
            f"{source}: pos_embed has {patches} positions for patches, which is not a square number; "
            "give a network of square images, conditioned on labels or on nothing"
        )
    blocks = {name.split(".")[1] for name in tensors if name.startswith("in_blocks.")}
    try:
        return UViTConfig(
            image_size=side * patch_size,
            patch_size=patch_size,
            in_channels=channels,
            dim=dim,
            depth=2 * len(blocks),
            heads=_heads(dim) if heads is None else heads,
            num_classes=max(0, rows - 1),
            mlp_ratio=tensors["in_blocks.0.mlp.fc1.weight"].shape[0] / dim,
            final_conv="final_layer.weight" in tensors,
            time_mlp="time_embed.0.weight" in tensors,
            qkv_bias="in_blocks.0.attn.qkv.bias" in tensors,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def with_classes(tensors: Mapping[str, Tensor], num_classes: int, generator: Generator) -> dict[str, Tensor]:
    """Return the weights with a new label embedding (num_classes + 1, dim) for other classes.

    It is for fine-tuning. New rows are normal with the standard deviation of the old entries; the null
    class keeps its row, since "no label" means the same.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1")
    if LABEL_EMBEDDING not in tensors or len(tensors[LABEL_EMBEDDING]) < 2:
        raise ValueError(f"{LABEL_EMBEDDING} has no classes; give the weights of a class-conditional U-ViT")
    old, null = tensors[LABEL_EMBEDDING].split([len(tensors[LABEL_EMBEDDING]) - 1, 1])
    drawn = torch.randn(num_classes, old.shape[1], generator=generator)
    new = (old.float().std(correction=0).cpu() * drawn).to(old)
    return {**tensors, LABEL_EMBEDDING: torch.cat([new, null])}


def export_published_uvit(model: UViT, folder: str | Path) -> str:
    """Write `nnet_ema.pth` atomically into `folder` (local or a URI); return its URI.

    It is a dict of CPU tensors under the published names, readable with `weights_only=True`. Raises
    ValueError for a network with modulation, for which the published format has no names.
    """
    if model.config.modulation:
        raise ValueError(
            "modulation=True does not exist in the published U-ViT format; train with modulation=False "
            "to export, or use the safetensors of the run"
        )
    # Cloned, since saving a view writes its whole storage.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    target = Artifact(str(folder))
    with target.writing(EMA_FILE) as file:
        torch.save(tensors, file)
    return target.file_uri(EMA_FILE)


def _weight_file(path: str | Path) -> str:
    fs, root = url_to_fs(str(path), use_listings_cache=False)
    if not fs.isdir(root):
        return str(path)
    for name in (EMA_FILE, RAW_FILE):
        if fs.isfile(f"{root.rstrip('/')}/{name}"):
            return f"{str(path).rstrip('/')}/{name}"
    raise ValueError(
        f"{path}: no {EMA_FILE} or {RAW_FILE} in this folder; give a checkpoint's folder or file"
    )


def _heads(dim: int) -> int:
    if dim not in PUBLISHED_HEADS:
        raise ValueError(
            f"dim {dim} is not a published size ({sorted(PUBLISHED_HEADS)}), and no shape shows the number "
            "of heads; give heads"
        )
    return PUBLISHED_HEADS[dim]
