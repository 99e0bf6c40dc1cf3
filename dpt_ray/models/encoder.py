"""The frozen encoder of stages 1 and 3: uint8 pixels in, one feature row per image out."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from dpt_ray.data.crops import FILTERS, Crop
from dpt_ray.models.conv import SmallConvNet
from dpt_ray.models.encoder_spec import EncoderKind, EncoderSpec, Source
from dpt_ray.models.own_networks import vision_transformer
from dpt_ray.models.precision import Precision, autocast
from dpt_ray.models.resnet import ResNet
from dpt_ray.models.weights import load_strict, load_weights, save_weights

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TIMM_CROPS: dict[str, Literal["eval", "squash"]] = {"center": "eval", "squash": "squash"}


class Encoder(nn.Module):
    """A frozen network with its crop and normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: EncoderSpec, precision: Precision = "float32") -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.spec, self.precision = spec, precision
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1), persistent=False)

    @property
    def crop(self) -> Crop:
        """The crop that `forward` expects."""
        return self.spec.crop

    @property
    def dim(self) -> int:
        """Length of a feature row."""
        return self.spec.dim

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return float32 features (B, dim) of cropped uint8 pixels (B, H, W, C)."""
        channels = len(self.spec.mean)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != channels:
            raise ValueError(
                f"encoder {self.spec.name} takes uint8 pixels (B, H, W, {channels}),"
                f" not {pixels.dtype} {tuple(pixels.shape)}"
            )
        x = (rearrange(pixels, "b h w c -> b c h w").float() / 255 - self.mean) / self.std
        with autocast(x.device, self.precision):
            features = apply_network(self.network, self.spec, x)
        return features.float()


def apply_network(network: nn.Module, spec: EncoderSpec, x: Tensor) -> Tensor:
    """Return the features (B, dim) of normalised images (B, C, H, W)."""
    features: Tensor = network(x, spec.blocks) if spec.kind == "msn" else network(x)
    return features


def open_encoder(
    kind: str,
    *,
    name: str | None = None,
    weights: str | Path | None = None,
    blocks: int = 1,
    heads: int | None = None,
    image_size: int | None = None,
    precision: Precision = "float32",
) -> Encoder:
    """Return a published encoder of a kind of `ENCODERS`, with its crop; see `Source`.

    Raises ValueError for arguments or weights that do not fit.
    """
    openers = {name: kind.open for name, kind in ENCODERS.items() if kind.open}
    if kind not in openers:
        raise ValueError(f"encoder kind {kind!r} is unknown; use one of {', '.join(openers)}")
    network, spec = openers[kind](Source(name, weights, blocks, heads, image_size))
    return Encoder(network, spec, precision)


def save_encoder(folder: str | Path, encoder: Encoder) -> None:
    """Write `model.safetensors` and `config.json` into a local folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(encoder.network.state_dict(), folder / "model.safetensors")
    encoder.spec.save(folder / "config.json")


def load_encoder(folder: str | Path, precision: Precision = "float32") -> Encoder:
    """Return the encoder of a folder, local or a URI, that `save_encoder` wrote."""
    spec = EncoderSpec.load(f"{folder}/config.json")
    if spec.kind not in ENCODERS:
        raise ValueError(f"{folder}/config.json: unknown encoder kind {spec.kind!r}")
    source = f"{folder}/model.safetensors"
    return Encoder(ENCODERS[spec.kind].load(spec, load_weights(source), source), spec, precision)


def _load_msn(spec: EncoderSpec, tensors: dict[str, Tensor], source: str) -> nn.Module:
    from dpt_ray.models.msn import msn_vit

    return msn_vit(tensors, source, spec.heads)


def _load_timm(spec: EncoderSpec, tensors: dict[str, Tensor], source: str) -> nn.Module:
    channels, size, patch = len(spec.mean), spec.crop.size, spec.patch_size
    own = patch and vision_transformer(spec.name, channels, size, patch)
    network: nn.Module = own or _timm_network(spec.name, channels)
    load_strict(network, tensors, source)
    return network


def _load_conv(spec: EncoderSpec, tensors: dict[str, Tensor], source: str) -> nn.Module:
    network = SmallConvNet(len(spec.mean), spec.width, spec.dim)
    load_strict(network, tensors, source)
    return network


def _load_resnet(spec: EncoderSpec, tensors: dict[str, Tensor], source: str) -> nn.Module:
    network = ResNet(len(spec.mean), spec.width)
    load_strict(network, tensors, source)
    return network


def _open_msn(given: Source) -> tuple[nn.Module, EncoderSpec]:
    from dpt_ray.models.msn import load_msn

    weights, blocks = given.weights, given.blocks
    if weights is None:
        raise ValueError("encoder kind msn needs weights, such as vitb4_300ep.pth.tar")
    network = load_msn(weights, given.heads)
    if not 1 <= blocks <= len(network.blocks):
        raise ValueError(f"encoder.blocks {blocks} must be 1 to {len(network.blocks)} for {weights}")
    # MSN's evaluation: short side to 8/7 of the crop (256 for 224), bilinear.
    size = network.image_size
    spec = EncoderSpec(
        kind="msn",
        name=given.name or Path(weights).name,
        dim=network.dim * blocks,
        crop=Crop("eval", size, round(size * 8 / 7), "bilinear"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        heads=network.heads,
        blocks=blocks,
    )
    return network, spec


def timm_weights(name: str) -> str:
    """Return the URI of timm's weights for a model. Raises ValueError where it publishes none."""
    known = _timm_config(name)
    if known is None or not known.hf_hub_id:
        raise ValueError(
            f"encoder {name!r}: timm publishes no weights of that name; set encoder.weights, or "
            "encoder.name to one of timm.list_pretrained()"
        )
    return f"hf://{known.hf_hub_id}/model.safetensors"


def _timm_config(name: str) -> "PretrainedCfg | None":
    """Return timm's description of a model's weights, None for an unknown model or tag."""
    import timm  # slow to import, and unused by the other kinds

    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # the model is known, the tag after the dot is not
        return None


def _open_timm(given: Source) -> tuple[nn.Module, EncoderSpec]:
    import timm

    name = given.name
    if name is None:
        raise ValueError("encoder kind timm needs name, such as vit_base_patch16_224.mae")
    weights = given.weights or timm_weights(name)
    network = _timm_network(name)
    load_strict(network, _without_classifier(load_weights(weights), network), weights)
    data: dict[str, Any] = timm.data.resolve_model_data_config(network)
    _, height, size = data["input_size"]
    kind = TIMM_CROPS.get(data["crop_mode"])
    if kind is None or data["interpolation"] not in FILTERS or height != size:
        raise ValueError(
            f"encoder {name} needs crop mode {data['crop_mode']}, {data['interpolation']}, {height} x {size}:"
            f" only {', '.join(TIMM_CROPS)} with {' or '.join(FILTERS)} resizing to a square is supported; "
            "choose another model"
        )
    resize = math.floor(size / data["crop_pct"])
    if given.image_size:
        if network.pretrained_cfg["fixed_input_size"]:
            raise ValueError(
                f"encoder {name} takes images of {size} pixels only: leave encoder.image_size out, or choose "
                "a convolutional network"
            )
        size = resize = given.image_size
    spec = EncoderSpec(
        kind="timm",
        name=name,
        dim=network.head_hidden_size,
        crop=Crop(kind, size, resize, data["interpolation"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
    return network, spec


def _timm_network(name: str, channels: int = 3) -> Any:
    import timm

    if _timm_config(name) is None:
        raise ValueError(
            f"encoder {name!r} is not a timm model; set encoder.name to one of timm.list_pretrained()"
        )
    return timm.create_model(name, num_classes=0, in_chans=channels)


def _without_classifier(tensors: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Return the weights without those of the classification head."""
    heads = network.pretrained_cfg["classifier"] or ()
    names = (heads,) if isinstance(heads, str) else heads
    prefixes = tuple(f"{name}." for name in names)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


ENCODERS = {
    "conv": EncoderKind(_load_conv),
    "resnet": EncoderKind(_load_resnet),
    "msn": EncoderKind(_load_msn, _open_msn),
    "timm": EncoderKind(_load_timm, _open_timm),
}
