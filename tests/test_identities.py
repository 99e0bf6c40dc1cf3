"""The identity of every node of every configuration: a change of the code keeps what people have made.

`golden/identities.json` was recorded before the package was split into its present rooms. An entry may
change only together with a result; `python -m tests.test_identities` records them anew.
"""

import hashlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from dpt_ray.config import load_config
from dpt_ray.config.study import load_study
from dpt_ray.data.fingerprint import fingerprint
from dpt_ray.models import precision
from dpt_ray.pipeline import flow as graph
from dpt_ray.pipeline import stage_settings
from tests.helpers.paths import CONFIGS, DIGITS, GOLDEN

FILES = sorted(CONFIGS.glob("*.yaml"))
RECORDED = GOLDEN / "identities.json"
# Of what no configuration in configs/ uses: changes to the digits'.
VARIANTS = {
    "options": (
        "diffusion.min_snr_gamma=5",
        "diffusion.min_confidence=0.5",
        "diffusion.alignment=0.5",
        "diffusion.shuffle_shards=8",
        "diffusion.preview_every=100",
        "diffusion.frechet_every=100",
        "diffusion.init_from=model.safetensors",
        "generate.guidance_interval=[0.1, 0.9]",
    ),
    "own_images": (
        "data={source: folder, uri: /flowers, mode: RGB, image_size: 32, validation: 10, test: 10}",
        "data.keep_in_train=[first.csv, second.csv]",
        "data.splits={val: test}",
        "labels={file: labels.csv, per_class: null}",
        "diffusion.schedule=vp",
    ),
    "imported": (
        "data.mode=RGB",
        "encoder={kind: timm, name: vit_tiny_patch16_224, weights: weights.safetensors}",
        "autoencoder={kind: kl, weights: autoencoder.pth, precision: bfloat16}",
        "evaluate={inception: inception.pth, reference: reference.npz, images: 100, resize: clean}",
        "diffusion.condition=true_labels",
        "diffusion.weights=nnet_ema.pth",
    ),
    "ladder": ("ladder={}", "labels_from=propagation"),
    "best_of_the_ladder": ("ladder={rungs: [self_training], prior: none}", "labels_from=best"),
    "features": ("generate_in=features", "ladder={}", "labels_from=best"),
    "features_first": ("generate_in=both",),
    "given_labels": ("labels_from=file", "pseudo_labels_file=zero_shot.csv"),
    "student": ("student={network: resnet, width: 8, steps: 10, batch_size: 64, learning_rate: 1e-3}",),
    "resampled": ("generate.resample={min_confidence: 0.5}",),
    "unconditional": ("diffusion.condition=none", "evaluate.controls=false", "sweep=null"),
}


def content(key, source):
    return f"content of {Path(source).name}"


def identities(config):
    """The reference of each node. Files that are not here count by their name, images by none.

    `precision: auto` is bfloat16 in all of them, whatever this processor is good at.
    """
    here = config.data.source == "digits"
    with (
        patch.object(precision, "bfloat16_gain", lambda: 2.0),
        patch.object(graph, "content", content),
        patch.object(stage_settings, "content", content),
        patch.object(stage_settings, "fingerprint", fingerprint if here else lambda data: "the images"),
    ):
        return {name: node.reference for name, node in graph.flow(config).items()}


def of_file(path):
    """A run's references by node; a study's runs, each as one hash of them all."""
    if "\nstudy:" not in path.read_text():
        return identities(load_config(path))
    runs = {name: identities(config) for name, config in load_study(path)[1].items()}
    texts = {name: json.dumps(nodes, sort_keys=True) for name, nodes in runs.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_identity_of_a_configuration_has_changed(path):
    assert of_file(path) == json.loads(RECORDED.read_text())[path.stem]


def of_variant(name):
    return identities(load_config(DIGITS, VARIANTS[name]))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_identity_of_an_option_has_changed(name):
    assert of_variant(name) == json.loads(RECORDED.read_text())[f"digits with {name}"]


if __name__ == "__main__":
    found = {path.stem: of_file(path) for path in FILES}
    found |= {f"digits with {name}": of_variant(name) for name in VARIANTS}
    RECORDED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    sys.stdout.write(f"{len(found)} configurations: {RECORDED}\n")
