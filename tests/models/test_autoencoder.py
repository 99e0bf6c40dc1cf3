import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

from dpt_ray.models.autoencoder import WEIGHTS_NAME, load_autoencoder, open_autoencoder
from tests.helpers.paths import GOLDEN
from tests.helpers.weights import assert_same_weights

LDM = GOLDEN / "autoencoder_kl.pth"


@pytest.fixture(scope="module")
def golden():
    return safetensors.torch.load_file(GOLDEN / "autoencoder_kl.safetensors")


@pytest.fixture(scope="module")
def kl():
    return open_autoencoder("kl", LDM, size=32)


def assert_same(one, other):
    assert (one.scale, one.image_shape) == (other.scale, other.image_shape)
    assert_same_weights(one, other)


def pixels(batch, size, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, size, size, channels), generator=generator).to(torch.uint8)


@torch.no_grad()
def test_kl_moments_and_decoded_images_are_the_published_ones(golden, kl):
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(kl.moments(golden["x"]), golden["moments"], **close)
    torch.testing.assert_close(kl.reconstruct(golden["z"]), golden["decoded"], **close)
    assert (kl.scale, kl.latent_shape) == (0.18215, (4, 16, 16))


@torch.no_grad()
def test_pixels_enter_and_leave_in_the_network_range(golden, kl):
    images = pixels(2, 32)
    x = (images.double() / 255 * 2 - 1).float().permute(0, 3, 1, 2)
    torch.testing.assert_close(kl.encode_moments(images), kl.moments(x), rtol=0, atol=1e-5)
    decoded = kl.decode(golden["z"])
    expected = (golden["decoded"].double() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    assert decoded.dtype == torch.uint8
    assert (decoded.double() - expected).abs().max() < 0.51  # nearest, up to the 1e-4 above


@pytest.mark.parametrize("kind", ["kl", "identity"])
def test_flip_is_the_encoding_of_the_mirrored_image(kl, kind):
    autoencoder = kl if kind == "kl" else open_autoencoder("identity", size=32)
    images = pixels(2, 32)
    mirrored = torch.from_numpy(images.numpy()[:, :, ::-1].copy())
    flipped = autoencoder.encode_moments(images, flip=True)
    torch.testing.assert_close(flipped, autoencoder.encode_moments(mirrored), rtol=0, atol=1e-6)
    assert not torch.allclose(flipped, autoencoder.encode_moments(images), atol=1e-3)


def test_identity_returns_every_pixel_value_and_has_no_variance():
    autoencoder = open_autoencoder("identity", channels=1, size=16)
    images = torch.arange(256).to(torch.uint8).reshape(1, 16, 16, 1)
    mean, logvar = autoencoder.encode_moments(images).chunk(2, dim=1)
    assert (mean.min(), mean.max(), mean.shape) == (-1, 1, (1, 1, 16, 16))
    assert (logvar == -30).all()
    assert autoencoder.scale == 1
    assert torch.equal(autoencoder.decode(mean.half().float()), images)
    assert torch.equal(autoencoder.decode(mean), images)


def test_identity_decoding_clamps():
    autoencoder = open_autoencoder("identity", channels=1, size=2)
    out = autoencoder.decode(torch.tensor([-3.0, -1.0, 0.0, 7.0]).reshape(1, 1, 2, 2))
    assert out.flatten().tolist() == [0, 0, 128, 255]


def test_kl_folder_is_read_by_diffusers_and_by_us_with_the_same_identity(tmp_path, golden, kl):
    kl.save(tmp_path)
    ours, theirs = load_autoencoder(tmp_path), AutoencoderKL.from_pretrained(tmp_path)
    assert_same(ours, kl)
    assert ours.latent_shape == kl.latent_shape
    with torch.no_grad():
        expected = theirs.encode(golden["x"]).latent_dist.parameters
        torch.testing.assert_close(ours.moments(golden["x"]), expected, rtol=0, atol=1e-5)
    assert theirs.config.scaling_factor == 0.18215


def test_a_folder_on_the_hub_is_read_by_its_uri(tmp_path, hub, kl):
    kl.save(tmp_path / "vae")
    for file in ("config.json", WEIGHTS_NAME):
        hub(f"org/vae-ema/{file}", (tmp_path / "vae" / file).read_bytes())
    assert_same(open_autoencoder("kl", "hf://org/vae-ema", size=32), kl)


def test_a_folder_with_the_attention_names_of_older_diffusers_loads(tmp_path, kl):
    kl.save(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_NAME)
    for name in list(tensors):
        for new_name, old_name in old.items():
            if new_name in name:
                tensors[name.replace(new_name, old_name)] = tensors.pop(name)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_NAME)
    assert any("proj_attn" in name for name in tensors)
    assert_same(load_autoencoder(tmp_path), kl)


def test_identity_folder_round_trip(tmp_path):
    autoencoder = open_autoencoder("identity", channels=1, size=8)
    autoencoder.save(tmp_path)
    again = load_autoencoder(tmp_path)
    assert again.latent_shape == (1, 8, 8)
    assert_same(again, autoencoder)


def test_bfloat16_is_near_and_float32_outside(golden, kl):
    fast = open_autoencoder("kl", LDM, size=32, precision="bfloat16")
    images = pixels(2, 32)
    moments = fast.encode_moments(images)
    assert moments.dtype == torch.float32
    assert 0 < (moments - kl.encode_moments(images)).abs().max() < 0.02
    error = (fast.decode(golden["z"]).int() - kl.decode(golden["z"]).int()).abs()
    assert 0 < error.float().mean() < 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.mid.block_1.conv1.weight", r"missing \(encoder\.mid_block\.resnets\.0\.conv1"),
        ("post_quant_conv.weight", r"not an LDM autoencoder: no post_quant_conv\.weight"),
    ],
)
def test_an_incomplete_ldm_file_is_refused_by_name(tmp_path, key, message):
    tensors = torch.load(LDM, weights_only=True)
    del tensors[key]
    torch.save(tensors, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=rf"cut\.pth.*{message}"):
        open_autoencoder("kl", tmp_path / "cut.pth", size=32)


@pytest.mark.parametrize("key", ["encoder.down.1.attn.0.q.weight", "loss.logvar"])
def test_an_ldm_file_with_unknown_keys_is_refused_by_name(tmp_path, key):
    tensors = torch.load(LDM, weights_only=True)
    tensors[key] = torch.zeros(64, 64, 1, 1)
    torch.save(tensors, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=rf"more\.pth: .*1 unexpected \({key}\)"):
        open_autoencoder("kl", tmp_path / "more.pth", size=32)


def test_diffusers_weights_given_as_an_ldm_file_are_refused(tmp_path, kl):
    kl.save(tmp_path)
    with pytest.raises(ValueError, match="not an LDM autoencoder"):
        open_autoencoder("kl", tmp_path / WEIGHTS_NAME, size=32)


def test_a_wrong_size_or_kind_is_named(tmp_path, kl):
    with pytest.raises(ValueError, match="size 33 must be a multiple of 2"):
        open_autoencoder("kl", LDM, size=33)
    with pytest.raises(ValueError, match="'vq'"):
        open_autoencoder("vq", LDM)
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        open_autoencoder("kl", tmp_path / "no-folder")
    with pytest.raises(ValueError, match=r"uint8 pixels \(B, 32, 32, 3\).*\(1, 16, 16, 3\)"):
        kl.encode_moments(pixels(1, 16))
