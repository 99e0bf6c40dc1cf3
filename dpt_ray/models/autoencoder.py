"""The first stage of latent diffusion: images to moments, latents back to images.

Tensor spaces, converted only here: pixels are uint8 (B, H, W, C); network pixels are float
(B, C, H, W) in [-1, 1]; moments are the unscaled mean and logvar of the latent, concatenated
(B, 2C', h, w); latents are the denoiser's input, z = scale * (mean + std * noise).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from dpt_ray.models.precision import Precision, autocast
from dpt_ray.models.weights import load_strict, load_weights, local_copy, save_weights

if TYPE_CHECKING:  # slow to import, and unused by the identity
    from diffusers import AutoencoderKL

SD_SCALE = 0.18215  # 1 / std of Stable Diffusion's latents (Rombach et al. 2022, arXiv 2112.10752)
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
OLD_ATTENTION_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


class Autoencoder(nn.Module):
    """Base of both autoencoders; `latent_shape` is (C', h, w), `scale` multiplies raw latents."""

    latent_shape: tuple[int, int, int]
    scale: float
    image_shape: tuple[int, int, int]

    def moments(self, x: Tensor) -> Tensor:
        """Return mean and logvar (B, 2C', h, w), unscaled, of network pixels (B, C, H, W)."""
        raise NotImplementedError

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Return network pixels (B, C, H, W), not clamped, of scaled latents (B, C', h, w)."""
        raise NotImplementedError

    def compile_networks(self) -> None:
        """Have torch.compile compile encoder and decoder when they are first called."""

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor, flip: bool = False) -> Tensor:
        """Return float32 moments (B, 2C', h, w) of pixels (B, H, W, C), or of their mirror images."""
        channels, height, width = self.image_shape
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (height, width, channels):
            raise ValueError(
                f"this autoencoder takes uint8 pixels (B, {height}, {width}, {channels}),"
                f" not {pixels.dtype} {tuple(pixels.shape)}; crop to its size first"
            )
        x = rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1
        return self.moments(x.flip(3) if flip else x).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 pixels (B, H, W, C), rounded to nearest, of scaled latents (B, C', h, w)."""
        x = self.reconstruct(latents).float().clamp(-1, 1)
        pixels = ((x + 1) * 127.5 + 0.5).to(torch.uint8)
        return rearrange(pixels, "b c h w -> b h w c").contiguous()

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load_autoencoder` reads."""
        raise NotImplementedError


class IdentityAutoencoder(Autoencoder):
    """Pixels as their own latents, with almost no variance, for images as small as latents."""

    LOGVAR = -30.0  # the lower clamp of the moments' logvar: std = 3e-7

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.image_shape = self.latent_shape = (channels, size, size)
        self.scale = 1.0

    def moments(self, x: Tensor) -> Tensor:
        """Return x and a constant logvar."""
        return torch.cat([x, torch.full_like(x, self.LOGVAR)], dim=1)

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Return the latents."""
        return latents

    def save(self, folder: str | Path) -> None:
        """Write `config.json`; there are no weights."""
        channels, size, _ = self.image_shape
        config = {"_class_name": type(self).__name__, "channels": channels, "size": size}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class KLAutoencoder(Autoencoder):
    """Stable Diffusion's KL-regularised autoencoder (arXiv 2112.10752) for images of one size."""

    def __init__(self, vae: AutoencoderKL, size: int, precision: Precision = "float32") -> None:
        super().__init__()
        config = vae.config
        if config.shift_factor is not None or config.latents_mean is not None:
            raise ValueError(
                "an autoencoder that shifts its latents is not supported; use Stable Diffusion's"
            )
        factor = 2 ** (len(config.block_out_channels) - 1)
        if size % factor:
            raise ValueError(f"image size {size} must be a multiple of {factor}")
        # On a CPU channels-last makes bfloat16 convolutions twice as fast and float32 ones slower.
        fast = precision == "bfloat16"
        self.memory_format = torch.channels_last if fast else torch.contiguous_format
        self.vae = vae.eval().requires_grad_(False).to(memory_format=self.memory_format)
        self.precision = precision
        self.image_shape = (config.in_channels, size, size)
        self.latent_shape = (config.latent_channels, size // factor, size // factor)
        self.scale = float(config.scaling_factor)

    def compile_networks(self) -> None:
        """Have torch.compile compile encoder and decoder when they are first called."""
        self.vae.encoder.compile()
        self.vae.decoder.compile()

    def moments(self, x: Tensor) -> Tensor:
        """Return the posterior's mean and logvar, not clamped."""
        with autocast(x.device, self.precision):
            x = x.contiguous(memory_format=self.memory_format)
            return self.vae.encode(x).latent_dist.parameters

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Return the decoder's output for latents / scale."""
        with autocast(latents.device, self.precision):
            raw = (latents / self.scale).contiguous(memory_format=self.memory_format)
            return self.vae.decode(raw).sample

    def save(self, folder: str | Path) -> None:
        """Write a folder in diffusers' format."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.vae.register_to_config(sample_size=self.image_shape[1])
        self.vae.save_config(folder)
        save_weights(self.vae.state_dict(), Path(folder) / WEIGHTS_NAME)


def open_autoencoder(
    kind: Literal["identity", "kl"],
    path: str | Path | None = None,
    *,
    channels: int = 3,
    size: int | None = None,
    precision: Precision = "float32",
) -> Autoencoder:
    """Return the autoencoder for images of `size` pixels: the identity, or a KL one read from `path`.

    `path` is an LDM-named state dict (`autoencoder_kl.pth`, `autoencoder_kl_ema.pth`) or a folder in
    diffusers' format, local or a URI, such as `hf://stabilityai/sd-vae-ft-ema`. `size` defaults to the
    folder's; only the identity needs `channels`. Raises ValueError for arguments or weights that do
    not fit.
    """
    if kind == "identity":
        if size is None:
            raise ValueError("the identity autoencoder needs size, the side of the images in pixels")
        return IdentityAutoencoder(channels, size)
    if kind != "kl" or path is None:
        raise ValueError(f"autoencoder {kind!r} from {path}: give identity, or kl and its weights")
    if Path(path).suffix in (".pth", ".pt", ".ckpt", ".safetensors"):
        vae = _from_ldm(load_weights(path), path)
    else:
        vae = _from_folder(path)
    return KLAutoencoder(vae, size or vae.config.sample_size, precision)


def load_autoencoder(folder: str | Path, precision: Precision = "float32") -> Autoencoder:
    """Return the autoencoder of a folder or URI that `Autoencoder.save` wrote."""
    config = _read_config(folder)
    if config.get("_class_name") == IdentityAutoencoder.__name__:
        return IdentityAutoencoder(config["channels"], config["size"])
    return open_autoencoder("kl", folder, precision=precision)


def _from_folder(folder: str | Path) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    config = _read_config(folder)
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"{folder}: config.json describes no AutoencoderKL; give a folder in diffusers' format"
        )
    vae = AutoencoderKL.from_config(config)
    source = f"{folder}/{WEIGHTS_NAME}"
    load_strict(vae, _current_names(load_weights(source)), source)
    return vae


def _current_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the attention names of diffusers >= 0.15; published folders are older."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in OLD_ATTENTION_NAMES.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        renamed[name] = tensor
    return renamed


def _read_config(folder: str | Path) -> dict[str, Any]:
    return json.loads(local_copy(f"{folder}/config.json").read_text())


def _from_ldm(tensors: dict[str, Tensor], source: str | Path) -> AutoencoderKL:
    """Return diffusers' network with the weights of an LDM-named state dict, sized by their shapes."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = _ldm_config(tensors, source)
    converted = convert_ldm_vae_checkpoint(tensors, config)
    # The converter drops unknown keys; add them back, so that they are reported as unexpected.
    known = {tensor.data_ptr() for tensor in converted.values()}
    dropped = {name: t for name, t in tensors.items() if t.data_ptr() not in known}
    vae = AutoencoderKL(**config)
    load_strict(vae, converted | dropped, source)
    return vae


def _ldm_config(tensors: dict[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Return AutoencoderKL's arguments; groups (32) and scale, which no shape shows, are LDM's."""
    try:
        levels = {int(k.split(".")[2]) for k in tensors if k.startswith("encoder.down.")}
        depth = 1 + max(levels, default=0)
        channels = [len(tensors[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(depth)]
        blocks = {k.split(".")[4] for k in tensors if k.startswith("encoder.down.0.block.")}
        return {
            "in_channels": tensors["encoder.conv_in.weight"].shape[1],
            "out_channels": tensors["decoder.conv_out.weight"].shape[0],
            "latent_channels": tensors["post_quant_conv.weight"].shape[1],
            "block_out_channels": tuple(channels),
            "layers_per_block": len(blocks),
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
            "sample_size": 256,
            "scaling_factor": SD_SCALE,
        }
    except KeyError as error:
        raise ValueError(
            f"{source}: not an LDM autoencoder: no {error.args[0]}; give a bare first-stage state"
            " dict such as autoencoder_kl.pth, or a folder in diffusers' format"
        ) from error
