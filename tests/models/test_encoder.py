import fsspec
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torchvision.transforms.v2 import functional

from dpt_ray.config.training import Pretrain
from dpt_ray.data.crops import Crop, crop
from dpt_ray.models.conv import SmallConvNet
from dpt_ray.models.encoder import Encoder, load_encoder, open_encoder, save_encoder, timm_weights
from dpt_ray.models.msn import load_msn
from dpt_ray.models.own_networks import conv_spec, own_network
from dpt_ray.models.weights import load_weights
from tests.helpers.paths import GOLDEN

MSN = GOLDEN / "msn_vit.pth.tar"
HEADS = 3


@pytest.fixture(scope="module")
def golden():
    return safetensors.torch.load_file(GOLDEN / "msn_vit.safetensors")


@pytest.fixture(scope="module")
def msn():
    return load_msn(MSN, HEADS).eval()


def pixels(batch, size, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, size, size, channels), generator=generator).to(torch.uint8)


def photograph(width, height):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def small_conv(dim=24):
    return SmallConvNet(1, 8, dim, torch.Generator().manual_seed(1))


def small_encoder():
    return Encoder(small_conv(), conv_spec(small_conv(), Crop("none", 8)))


def timm_file(folder, name):
    """A file with random weights of timm's model, head included, and the model without head."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=5).eval()
    for module in model.modules():  # running statistics and zero-initialised scales that matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
    file = folder / f"{name}.pth"
    torch.save({"state_dict": model.state_dict()}, file)
    model.reset_classifier(0)
    return file, model


@torch.no_grad()
def test_msn_features_are_the_published_ones(golden, msn):
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(msn(golden["x"]), golden["blocks1"], **close)
    torch.testing.assert_close(msn(golden["x"], blocks=4), golden["blocks4"], **close)
    torch.testing.assert_close(msn.norm(msn(golden["x"])), golden["features"], **close)
    torch.testing.assert_close(msn(golden["x_other"]), golden["blocks1_other"], **close)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_forward_pass_keeps_the_tokens_of_no_block_that_is_done(golden, blocks):
    network = load_msn(MSN, HEADS).eval()
    tokens, alive = [], []

    def count(block, inputs, output):
        tokens.append(StorageWeakRef(output.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in tokens))

    for block in network.blocks:
        block.register_forward_hook(count)
    network(golden["x"], blocks)
    assert len(alive) == 5 and max(alive) == 2  # a block's input and its output


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_msn_checkpoint_with_other_keys_is_refused_by_name(tmp_path, change):
    content = torch.load(MSN, weights_only=True)
    if change == "missing":
        del content["target_encoder"]["module.blocks.2.attn.qkv.bias"]
        name = "blocks.2.attn.qkv.bias"
    else:
        content["target_encoder"]["module.dist_token"] = torch.zeros(1)
        name = "dist_token"
    torch.save(content, tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match=rf"other\.pth\.tar.*1 {change} \({name}\)"):
        load_msn(tmp_path / "other.pth.tar", HEADS)


def test_msn_heads_must_divide_dim():
    for heads in (5, None):  # without a number: 48 / 64 heads
        with pytest.raises(ValueError, match=r"heads do not divide dim 48; set encoder\.heads"):
            load_msn(MSN, heads)


def test_msn_encoder_normalises_with_imagenet_statistics_and_crops_as_msn_evaluates(msn):
    encoder = open_encoder("msn", weights=MSN, heads=HEADS, blocks=2)
    assert encoder.crop == Crop("eval", 32, 37, "bilinear")  # 224 of 256, at 32 pixels
    assert encoder.dim == 96
    images = pixels(2, 32)
    x = functional.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True)
    x = functional.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    features = encoder(images)
    assert features.shape == (2, 96)
    with torch.no_grad():
        torch.testing.assert_close(features, msn(x, blocks=2), rtol=0, atol=1e-6)


def test_msn_encoder_survives_its_folder_local_and_remote(tmp_path):
    encoder = open_encoder("msn", weights=MSN, heads=HEADS, blocks=3)
    save_encoder(tmp_path, encoder)
    uri = "memory://encoders/msn"
    for file in tmp_path.iterdir():
        with fsspec.open(f"{uri}/{file.name}", "wb") as remote:
            remote.write(file.read_bytes())
    for folder in (tmp_path, uri):
        again = load_encoder(folder)
        assert again.spec == encoder.spec
        torch.testing.assert_close(again(pixels(2, 32)), encoder(pixels(2, 32)), rtol=0, atol=0)


def test_bfloat16_features_are_float32_and_near():
    exact = open_encoder("msn", weights=MSN, heads=HEADS)(pixels(4, 32))
    fast = open_encoder("msn", weights=MSN, heads=HEADS, precision="bfloat16")(pixels(4, 32))
    assert fast.dtype == torch.float32
    assert not torch.equal(fast, exact)
    assert torch.nn.functional.cosine_similarity(fast, exact).min() > 0.999
    with pytest.raises(ValueError, match="precision 'bf16'"):
        open_encoder("msn", weights=MSN, heads=HEADS, precision="bf16")(pixels(1, 32))


@pytest.mark.parametrize("size", [8, 32])
def test_conv_features_do_not_depend_on_the_batch(size):
    network = small_conv()
    x = torch.rand(6, 1, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        whole, alone = network(x), torch.cat([network(row[None]) for row in x])
    assert whole.shape == (6, 24)
    assert whole.std(dim=0).min() > 0
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)


def test_conv_weights_come_from_the_generator():
    one, two = small_conv().state_dict(), small_conv().state_dict()
    torch.rand(1)
    other = SmallConvNet(1, 8, 24, torch.Generator().manual_seed(9)).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def section(**values):
    return Pretrain(steps=1, batch_size=128, learning_rate=1e-3, width=8, dim=24, **values)


OWN = {"small_conv": {}, "resnet": {}, "vit_tiny_patch16_224": {"patch_size": 4}}


@torch.no_grad()
@pytest.mark.parametrize("network", OWN)
def test_an_own_network_takes_pixels_in_minus_one_to_one_and_survives_its_folder(tmp_path, network):
    values = section(network=network, **OWN[network])
    made, spec = own_network(values, 3, 16, torch.Generator().manual_seed(0))
    encoder, images = Encoder(made, spec), pixels(4, 16)
    features = encoder(images)
    assert features.shape == (4, encoder.dim)
    assert encoder.dim == {"small_conv": 24, "resnet": 64, "vit_tiny_patch16_224": 192}[network]
    torch.testing.assert_close(features, made(images.permute(0, 3, 1, 2) / 127.5 - 1), rtol=0, atol=1e-5)
    alone = torch.cat([encoder(row[None]) for row in images])
    torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)  # nothing of a row is of its batch
    save_encoder(tmp_path, encoder)
    again = load_encoder(tmp_path)
    assert again.spec == spec
    torch.testing.assert_close(again(images), features, rtol=0, atol=0)


@pytest.mark.parametrize("network", OWN)
def test_an_own_networks_weights_come_from_the_generator_alone(network):
    def weights(seed):
        values = section(network=network, **OWN[network])
        network_of_seed, _ = own_network(values, 3, 16, torch.Generator().manual_seed(seed))
        return torch.cat([value.flatten() for value in network_of_seed.state_dict().values()])

    first = weights(0)
    torch.rand(1)
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))


@pytest.mark.parametrize("name", ["vit_imaginary", "resnet18"])
def test_a_network_that_is_no_vision_transformer_is_named(name):
    with pytest.raises(ValueError, match=f"network '{name}' is neither small_conv nor resnet nor"):
        own_network(section(network=name, patch_size=4), 3, 16)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_features_are_timms_own_with_its_crop_and_statistics(tmp_path, name):
    file, model = timm_file(tmp_path, name)
    encoder = open_encoder("timm", name=name, weights=file)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    photographs = [photograph(300, 211), photograph(170, 320)]
    images = torch.from_numpy(np.stack([crop(image, encoder.crop) for image in photographs]))
    with torch.no_grad():
        expected = model(torch.stack([transform(image) for image in photographs]))
    assert encoder.dim == expected.shape[1]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)
    save_encoder(tmp_path / "folder", encoder)
    again = load_encoder(tmp_path / "folder")
    assert again.spec == encoder.spec
    torch.testing.assert_close(again(images), encoder(images), rtol=0, atol=0)


def timm_wants(monkeypatch, **wanted):
    """Has timm's data config of every model say so."""
    resolve = timm.data.resolve_model_data_config
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda model: resolve(model) | wanted)


@pytest.mark.parametrize("size", [(300, 211), (170, 320), (177, 177)])
@pytest.mark.parametrize("wanted", [("squash", 0.9), ("squash", 1.0), ("center", 0.9), ("center", 1.0)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_timms_crops_are_timms_own(tmp_path, monkeypatch, size, wanted, interpolation):
    mode, share = wanted
    timm_wants(monkeypatch, crop_mode=mode, crop_pct=share, interpolation=interpolation)
    file, model = timm_file(tmp_path, "test_vit")
    encoder = open_encoder("timm", name="test_vit", weights=file)
    # Without normalisation: what comes out are the pixels.
    data = timm.data.resolve_model_data_config(model) | {"mean": (0, 0, 0), "std": (1, 1, 1)}
    image = photograph(*size)
    expected = timm.data.create_transform(**data)(image).permute(1, 2, 0) * 255
    assert np.array_equal(crop(image, encoder.crop), expected.round().numpy())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"crop_mode": "border"}, "crop mode border"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"input_size": (3, 96, 160)}, "96 x 160"),
    ],
)
def test_a_timm_crop_that_is_not_known_here_is_named(tmp_path, monkeypatch, wanted, message):
    file, _ = timm_file(tmp_path, "test_vit")
    timm_wants(monkeypatch, **wanted)
    with pytest.raises(ValueError, match=f"encoder test_vit needs.*{message}.*choose another model"):
        open_encoder("timm", name="test_vit", weights=file)


def test_timm_weights_of_another_model_are_refused_by_name(tmp_path):
    file, _ = timm_file(tmp_path, "test_resnet")
    with pytest.raises(ValueError, match=r"test_resnet\.pth.*VisionTransformer.*missing"):
        open_encoder("timm", name="test_vit", weights=file)


def test_a_timm_model_without_weights_has_those_of_its_name_on_the_hub(tmp_path, hub):
    file, _ = timm_file(tmp_path, "test_vit")
    tensors = load_weights(file)
    hub("timm/test_vit.r160_in1k/model.safetensors", safetensors.torch.save(tensors))
    assert timm_weights("test_vit") == "hf://timm/test_vit.r160_in1k/model.safetensors"
    found = open_encoder("timm", name="test_vit").network.state_dict()
    assert all(torch.equal(value, tensors[name]) for name, value in found.items())


@pytest.mark.parametrize("name", ["vit_imaginary", "test_vit.imaginary_tag"])
def test_a_timm_name_without_published_weights_is_told(name):
    with pytest.raises(ValueError, match=f"'{name}': timm publishes no weights"):
        timm_weights(name)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "timm",
            {"name": "vit_imaginary", "weights": MSN},
            "'vit_imaginary' is not a timm model; set encoder.name",
        ),
        ("timm", {"name": "test_vit.nosuch", "weights": MSN}, "'test_vit.nosuch' is not a timm model"),
        ("timm", {"weights": MSN}, "needs name"),
        ("msn", {}, "needs weights"),
        ("msn", {"weights": MSN, "heads": HEADS, "blocks": 6}, r"encoder\.blocks 6 must be 1 to 5"),
        ("dino", {"weights": MSN}, "'dino' is unknown; use one of msn, timm"),
    ],
)
def test_a_wrong_setting_is_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_encoder(kind, **arguments)


def test_wrong_pixels_are_named():
    encoder = small_encoder()
    with pytest.raises(ValueError, match=r"uint8 pixels \(B, H, W, 1\).*float32"):
        encoder(torch.zeros(2, 8, 8, 1))
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 3\)"):
        encoder(pixels(2, 8))


def test_a_foreign_config_is_named(tmp_path):
    save_encoder(tmp_path, small_encoder())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"width"', '"depth"'))
    with pytest.raises(ValueError, match=r"config\.json: not an encoder's.*depth"):
        load_encoder(tmp_path)


def test_a_convolutional_timm_model_takes_images_of_a_size_that_is_asked_for(tmp_path):
    """The whole image is enlarged to it: no border is cut, as timm's crop would."""
    file, model = timm_file(tmp_path, "test_resnet")
    encoder = open_encoder("timm", name="test_resnet", weights=file, image_size=48)
    assert (encoder.crop.size, encoder.crop.resize) == (48, 48)
    image = photograph(32, 32)
    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    wanted = np.asarray(image.resize((48, 48), resampling[encoder.crop.interpolation]))
    cut = crop(image, encoder.crop)
    np.testing.assert_array_equal(cut, wanted)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.spec.mean, encoder.spec.std))
    x = (torch.from_numpy(wanted.copy()).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(encoder(torch.from_numpy(cut)[None])[0], model(x[None])[0])


def test_a_vision_transformer_of_one_size_refuses_another(tmp_path):
    file, _ = timm_file(tmp_path, "test_vit")
    with pytest.raises(ValueError, match=r"test_vit takes images of 160 pixels only: leave encoder"):
        open_encoder("timm", name="test_vit", weights=file, image_size=48)
