import pickle
from unittest.mock import patch

import cleanfid.inception_pytorch
import cleanfid.resize
import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dpt_ray.evaluation.inception import activations, load_inception, network_input


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network(inception_weights):
    return load_inception(inception_weights)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(0, 12, (2, 40, 56, 3)), axis=1) + 128
    return torch.from_numpy(smooth.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def found(network, images):
    return activations(network, images)


def test_pool_features_and_probabilities_are_torch_fidelitys(inception_weights, images, found):
    reference = FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], str(inception_weights))
    pool, logits = reference(images.permute(0, 3, 1, 2))
    assert pool.std() > 1e-2
    torch.testing.assert_close(found.pool, pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-7)


def test_spatial_features_are_seven_channels_of_mixed_6_conv_channels_last(inception_weights, images, found):
    reference = FeatureExtractorInceptionV3("reference", ["2048"], str(inception_weights))
    seen = []
    reference.Mixed_6d.branch1x1.register_forward_hook(lambda module, x, y: seen.append(y))
    reference(images.permute(0, 3, 1, 2))
    # ADM's evaluator: (B, 17, 17, 192)[..., :7].reshape(B, -1)
    expected = seen[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert found.spatial.shape == (2, 2023)
    assert expected.std() > 1e-2
    np.testing.assert_allclose(found.spatial.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_clean_resize_gives_the_features_of_clean_fids_resizer_and_network(
    inception_weights, network, images
):
    state = torch.load(inception_weights, weights_only=True)
    with patch.object(cleanfid.inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state):
        reference = cleanfid.inception_pytorch.InceptionV3(resize_input=False, normalize_input=False).eval()
    resize = cleanfid.resize.build_resizer("clean")
    pixels = np.stack([resize(image) for image in images.numpy()]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        (expected,) = reference((torch.from_numpy(pixels) - 128) / 128)
    found = activations(network, images, resize="clean").pool
    torch.testing.assert_close(found, expected[:, :, 0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (256, 256), (400, 320)])
def test_pytorch_fids_resize_is_clean_fids_legacy_pytorch_one(size):
    """`legacy_pytorch` is a port of pytorch-fid, which resizes 0..255 for a network that takes x / 255."""
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = 2 * (cleanfid.resize.build_resizer("legacy_pytorch")(image) / 255) - 1
    found = network_input(torch.from_numpy(image).permute(2, 0, 1)[None], "pytorch_fid")
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=2e-6)


def test_pytorch_fids_resize_interpolates_between_the_centres_of_pixels():
    """A ramp of 2 pixels, 0 and 255, by hand: output pixel i looks at (i + 1/2) 2 / 299 - 1/2."""
    ramp = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 2, 2)
    place = ((np.arange(299) + 0.5) * 2 / 299 - 0.5).clip(0, 1)
    found = network_input(ramp, "pytorch_fid")
    np.testing.assert_allclose(found[0, 0, 0].numpy(), 2 * place - 1, atol=1e-6)
    # TensorFlow's looks at 2 i / 299.
    found = network_input(ramp, "tensorflow")
    place = (np.arange(299) * 2 / 299).clip(0, 1)
    np.testing.assert_allclose(found[0, 0, 0].numpy(), (255 * place - 128) / 128, atol=1e-5)


def test_pytorch_fid_gives_the_features_of_clean_fids_port_of_it(inception_weights, network, images):
    state = torch.load(inception_weights, weights_only=True)
    with patch.object(cleanfid.inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state):
        reference = cleanfid.inception_pytorch.InceptionV3(resize_input=False).eval()
    resize = cleanfid.resize.build_resizer("legacy_pytorch")
    pixels = np.stack([resize(image) for image in images.numpy()]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        (expected,) = reference(torch.from_numpy(pixels) / 255)
    found = activations(network, images, resize="pytorch_fid").pool
    torch.testing.assert_close(found, expected[:, :, 0, 0], rtol=1e-4, atol=1e-4)
    assert (found - activations(network, images).pool).abs().max() > 1e-2


def test_grey_images_are_repeated_to_three_channels(network, images):
    grey = images[:1, ..., :1]
    repeated = torch.from_numpy(np.repeat(grey.numpy(), 3, axis=3))
    expected = activations(network, repeated, resize="clean").pool
    torch.testing.assert_close(activations(network, grey, resize="clean").pool, expected)


def test_missing_weights_name_the_file_to_fetch(tmp_path):
    with pytest.raises(ValueError, match=r"pt_inception-2015-12-05-6726825d\.pth .*6726825d.*95,628,359"):
        load_inception(tmp_path / "absent.pth")


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(10, 4)}, path)
    with pytest.raises(ValueError, match=r"other\.pth: not the weights"):
        load_inception(path)


class Code:
    def __reduce__(self):
        return pytest.fail, ("the pickle's code ran",)


def test_code_in_a_weight_file_is_not_run(tmp_path):
    path = tmp_path / "code.pth"
    path.write_bytes(pickle.dumps({"fc.weight": Code()}, protocol=2))
    with pytest.raises(ValueError, match=r"code\.pth"):
        load_inception(path)


@pytest.mark.parametrize("bad", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_images_of_another_type_or_layout_are_refused(network, bad):
    with pytest.raises(ValueError, match="pass uint8"):
        activations(network, bad)
