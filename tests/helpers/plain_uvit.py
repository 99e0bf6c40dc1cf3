"""U-ViT written a second time, from the paper and the published parameter names, for tests to compare with.

A checkpoint is a dict of tensors under these names (RECIPES: "U-ViT details"):

    patch_embed.proj, label_emb, pos_embed, time_embed.{0,2}, in_blocks.i.*, mid_block.*, out_blocks.i.*,
    norm, decoder_pred, final_layer

with blocks of {skip_linear, norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}. The network of an
unconditional checkpoint (`num_classes = -1`) has no label_emb and one position fewer.
"""

import math

import torch


def checkpoint(*, side, patch, channels, dim, depth, rows, qkv_bias, time_mlp=False, final_conv=True, seed=0):
    """A checkpoint with random weights; `rows` of the label embedding, the null class's too, or 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def put(name, *shape):
        tensors[name] = 0.3 * torch.randn(*shape, generator=generator)

    def linear(name, out, into, bias=True):
        put(f"{name}.weight", out, into)
        if bias:
            put(f"{name}.bias", out)

    def block(name, skip):
        if skip:
            linear(f"{name}.skip_linear", dim, 2 * dim)
        for norm in ("norm1", "norm2"):
            put(f"{name}.{norm}.weight", dim)
            put(f"{name}.{norm}.bias", dim)
        linear(f"{name}.attn.qkv", 3 * dim, dim, qkv_bias)
        linear(f"{name}.attn.proj", dim, dim)
        linear(f"{name}.mlp.fc1", 4 * dim, dim)
        linear(f"{name}.mlp.fc2", dim, 4 * dim)

    put("patch_embed.proj.weight", dim, channels, patch, patch)
    put("patch_embed.proj.bias", dim)
    if rows:
        put("label_emb.weight", rows, dim)
    if time_mlp:
        linear("time_embed.0", 4 * dim, dim)
        linear("time_embed.2", dim, 4 * dim)
    put("pos_embed", 1, (side // patch) ** 2 + 1 + bool(rows), dim)
    for i in range(depth // 2):
        block(f"in_blocks.{i}", skip=False)
        block(f"out_blocks.{i}", skip=True)
    block("mid_block", skip=False)
    put("norm.weight", dim)
    put("norm.bias", dim)
    linear("decoder_pred", patch * patch * channels, dim)
    if final_conv:
        put("final_layer.weight", channels, channels, 3, 3)
        put("final_layer.bias", channels)
    return tensors


def forward(tensors, heads, x, time, labels=None):
    """The network's output (B, C, H, W), each image and each head by itself, in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    return torch.stack(
        [
            _one(w, heads, x[i].double(), float(time[i]), None if labels is None else int(labels[i]))
            for i in range(len(x))
        ]
    )


def _one(w, heads, x, time, label):
    dim, channels, patch, _ = w["patch_embed.proj.weight"].shape
    side = x.shape[1] // patch
    tokens = [_time_token(w, time, dim)]
    if label is not None:
        tokens.insert(0, w["label_emb.weight"][label])
    for i in range(side):
        for j in range(side):
            piece = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            weights = w["patch_embed.proj.weight"]
            tokens.append((weights * piece).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    h = torch.stack(tokens) + w["pos_embed"][0]
    half = len({name.split(".")[1] for name in w if name.startswith("in_blocks.")})
    kept = []
    for i in range(half):
        h = _block(w, f"in_blocks.{i}", heads, h)
        kept.append(h)
    h = _block(w, "mid_block", heads, h)
    for i in range(half):  # the last that was kept comes first
        h = _linear(w, f"out_blocks.{i}.skip_linear", torch.cat([h, kept[half - 1 - i]], dim=1))
        h = _block(w, f"out_blocks.{i}", heads, h)
    pixels = _linear(w, "decoder_pred", _norm(w, "norm", h))[-(side**2) :]
    image = torch.zeros_like(x)
    for n, values in enumerate(pixels):
        i, j = divmod(n, side)
        piece = values.reshape(patch, patch, channels).permute(2, 0, 1)
        image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = piece
    if "final_layer.weight" in w:
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # (C, H, W, 3, 3)
        image = torch.einsum("chwij,ocij->ohw", windows, w["final_layer.weight"])
        image = image + w["final_layer.bias"][:, None, None]
    return image


def _time_token(w, time, dim):
    rates = [math.exp(-math.log(10000) * i / (dim // 2)) for i in range(dim // 2)]
    token = torch.tensor(
        [math.cos(time * rate) for rate in rates] + [math.sin(time * rate) for rate in rates],
        dtype=torch.float64,
    )
    if "time_embed.0.weight" in w:
        hidden = _linear(w, "time_embed.0", token)
        token = _linear(w, "time_embed.2", hidden * hidden.sigmoid())
    return token


def _block(w, name, heads, h):
    h = h + _attention(w, f"{name}.attn", heads, _norm(w, f"{name}.norm1", h))
    hidden = _linear(w, f"{name}.mlp.fc1", _norm(w, f"{name}.norm2", h))
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return h + _linear(w, f"{name}.mlp.fc2", gelu)


def _attention(w, name, heads, h):
    dim = h.shape[1]
    width = dim // heads
    qkv = _linear(w, f"{name}.qkv", h)
    q, k, v = qkv[:, :dim], qkv[:, dim : 2 * dim], qkv[:, 2 * dim :]
    found = []
    for head in range(heads):
        mine = slice(head * width, (head + 1) * width)
        scores = q[:, mine] @ k[:, mine].T / math.sqrt(width)
        weights = (scores - scores.max(dim=1, keepdim=True).values).exp()
        found.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, mine])
    return _linear(w, f"{name}.proj", torch.cat(found, dim=1))


def _norm(w, name, h):
    centred = h - h.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w, name, h):
    out = h @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out
