"""The best classifier with its encoder as an ONNX file, run by onnxruntime."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from dpt_ray.commands import export
from dpt_ray.commands.export import export_model
from dpt_ray.commands.predict import load_labeller
from dpt_ray.config import ConfigError
from dpt_ray.config.training import Pretrain
from dpt_ray.learners.linear_classifier import logits
from dpt_ray.models.encoder import Encoder
from dpt_ray.models.own_networks import feature_dim, own_network
from dpt_ray.models.served import Served, write_onnx


def run(path, pixels):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"pixels": pixels})[0]


def images(count, size, channels):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_the_exported_file_agrees_with_predict(finished, tmp_path):
    count = export_model(finished.config, "onnx", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    labeller = load_labeller(finished.config)
    assert facts["classes"] == labeller.classes and facts["method"] == labeller.choice.method
    assert facts["crop"].keys() == {"kind", "size", "steps"} and facts["mode"] == "L"
    assert facts["crop"]["size"] == 8 and "resize the shorter to 8, bicubic" in facts["crop"]["steps"]
    assert count > labeller.weights.size
    for batch in (1, 5):  # any number of images
        pixels = images(batch, 8, 1)
        found = run(tmp_path / "out" / export.ONNX_FILE, pixels)
        np.testing.assert_allclose(found, labeller(pixels), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("network", "patch"), [("resnet", None), ("test_vit", 4)])
def test_every_network_is_exported(tmp_path, network, patch):
    section = Pretrain(
        network=network, patch_size=patch, width=8, dim=16, steps=1, batch_size=128, learning_rate=1e-3
    )
    built, spec = own_network(section, 3, 16)
    encoder = Encoder(built, spec)
    W = np.random.default_rng(1).normal(size=(4, feature_dim(built))).astype(np.float32)
    write_onnx(Served(encoder, W, 0.5), tmp_path / "x.onnx")
    pixels = images(3, 16, 3)
    f = encoder(torch.from_numpy(pixels)).numpy()
    rows = (f - f.mean(1, keepdims=True)) / np.linalg.norm(
        f - f.mean(1, keepdims=True), axis=1, keepdims=True
    )
    e = np.exp(logits(rows, W) / 0.5)
    expected = e / e.sum(1, keepdims=True)
    np.testing.assert_allclose(run(tmp_path / "x.onnx", pixels), expected, rtol=1e-3, atol=1e-5)


def test_without_the_package_its_name_is_told(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx needs the package onnxscript: .* pip install -e"):
        export_model(finished.config, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
