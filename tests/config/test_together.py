"""Settings that do not fit together, told in one line with the remedy."""

import pytest

from dpt_ray.config import load_config
from tests.config.test_run import message
from tests.helpers.paths import DIGITS


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["compute.train_workers=3"], ["pretrain.batch_size 64", "multiple of 8", "train_workers (3)"]),
        (["compute.train_workers=3", "pretrain.batch_size=192"], ["diffusion.batch_size 64"]),
        (
            ["compute.train_workers=4", "pretrain.batch_size=256", "pretrain.contrast_group=128"],
            ["pretrain.batch_size 256 has 2 groups", "contrast_group 128", "train_workers (4)", "smaller"],
        ),
        (["compute.actor_gpus=1.5"], ["compute: actor_gpus 1.5: give a whole number"]),
        (["compute.min_train_workers=2"], ["min_train_workers 2", "train_workers 1", "the most"]),
        (["compute.gradient_accumulation=16"], ["diffusion.batch_size 64", "gradient_accumulation (16)"]),
        (
            ["diffusion.weights=u.pth", "diffusion.condition=true_labels", "diffusion.alignment=0.5"],
            ["alignment is for training", "leave one out"],
        ),
        (["diffusion.frechet_every=50"], ["frechet_every 50 must be a multiple of log_every 20"]),
        (["diffusion.min_confidence=0.5", "diffusion.condition=none"], ["min_confidence", "pseudo_labels"]),
        (["evaluate.referee.batch_size=96", "evaluate.referee.contrast_group=64"], ["contrast_group 64"]),
        (["retrain.images_per_class=500"], ["500", "generate.images_per_class is 128", "raise it"]),
        (["sweep.images_per_class=[16, 256]"], ["256", "generate.images_per_class is 128"]),
        (["diffusion.model.heads=5"], ["diffusion.model: heads 5 must divide dim 64"]),
        (["diffusion.model.patch_size=3"], ["patch_size 3 must divide data.image_size 8"]),
        (["pretrain.network=vit_tiny_patch16_224"], ["patch_size None", "set patch_size", "small_conv and"]),
        (["pretrain.patch_size=4"], ["pretrain: network small_conv with patch_size 4", "leave it out"]),
        (
            ["evaluate.referee.network=vit_tiny_patch16_224", "evaluate.referee.patch_size=3"],
            ["evaluate.referee.patch_size 3 must divide data.image_size 8"],
        ),
        (["pretrain.augmentation=photographs"], ["pretrain.augmentation photographs", "data.mode RGB"]),
        (["evaluate.referee.objective=msn"], ["evaluate.referee.objective", "unknown key"]),
        (["labels.file=list.csv"], ["labels: per_class 1 ", "labels.per_class=null or labels.file=null"]),
        (
            ["labels={file: a.csv, seed: 2, per_class: null}"],
            ["labels: seed 2 draws labels"],
        ),
        (["labels.per_class="], ["labels: give either per_class", "or file"]),
        (["data.uri=/images"], ["data: digits comes with scikit-learn", "leave out uri"]),
        (["data.source=tar"], ["data: source tar needs uri"]),
        (["pretrain="], ["encoder.kind pretrain needs a pretrain section"]),
        (["encoder.kind=msn"], ["encoder: kind msn needs weights"]),
        (["autoencoder.kind=kl"], ["autoencoder: kind kl needs weights"]),
        (["encoder={kind: msn, weights: a.pth}"], ["data.mode L", "encoder.kind msn", "set data.mode RGB"]),
        (["encoder={kind: timm, name: a}"], ["data.mode L", "encoder.kind timm", "set data.mode RGB"]),
        (["autoencoder={kind: kl, weights: a.pth}"], ["autoencoder.kind kl", "set data.mode RGB"]),
        (["generate.guidance_interval=[0.8, 0.2]"], ["guidance_interval (0.8, 0.2)", "low < high"]),
        (["encoder.weights=a.pth"], ["encoder: name and weights are of kinds timm and msn", "set kind"]),
        (["autoencoder.weights=a.pth"], ["autoencoder: weights are of kind kl", "set kind kl"]),
        (
            ["student={width: 20, steps: 5, batch_size: 8, learning_rate: 1e-3}"],
            ["student: width 20", "of 8"],
        ),
        (["evaluate.augmentation=photographs"], ["evaluate.augmentation photographs", "controls false"]),
        (
            ["data={source: folder, uri: a, splits: {Val: test, val: train}}"],
            ["data.splits", "are one name: leave one out"],
        ),
        (
            [
                "classifier.learner=semi_vit",
                "semi_supervised={steps: 5, supervised_steps: 5, batch_size: 16, learning_rate: 1e-3}",
            ],
            ["semi_supervised.supervised_steps 5 of 5 steps", "classifier.learner=supervised"],
        ),
        (["diffusion.ema_decay=1"], ["diffusion.ema_decay: 1: input should be less than 1"]),
        (["feature_diffusion.ema_decay=1"], ["feature_diffusion.ema_decay: 1: input should be less than 1"]),
        (["diffusion.betas=[0.9, 1.0]"], ["diffusion.betas.1: 1.0: input should be less than 1"]),
        (["diffusion.label_dropout=1"], ["diffusion.label_dropout: 1: input should be less than 1"]),
        (["diffusion.model={dim: 15, heads: 3}"], ["diffusion.model: dim 15 must be even"]),
        (
            ["diffusion.label_dropout=0", "generate.guidance=1.4"],
            ["generate.guidance 1.4", "diffusion.label_dropout 0 does not train: set that above 0"],
        ),
        (
            ["diffusion.label_dropout=0", "sweep.generate=[{nfe: 5}, {guidance: 2}]"],
            ["sweep.generate.1.guidance 2", "diffusion.label_dropout 0 does not train"],
        ),
        (
            ["diffusion.condition=none", "generate.guidance=1.4"],
            ["generate.guidance 1.4", "diffusion.condition none has none: set it to 1"],
        ),
        (
            ["feature_diffusion={guidance: 2, label_dropout: 0}"],
            ["feature_diffusion: guidance 2 leads", "set label_dropout above 0"],
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_told_with_the_remedy(overrides, parts):
    text = message(DIGITS, *overrides)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["diffusion.label_dropout=0"],
        ["diffusion.label_dropout=0", "diffusion.min_confidence=0.5", "generate.guidance=1.4"],
        ["diffusion.label_dropout=0", "diffusion.init_from=a.pth", "generate.guidance=1.4"],
        ["diffusion.label_dropout=0", "generate_in=features", "generate.guidance=1.4"],
    ],
)
def test_guidance_is_from_a_null_class_that_something_trains(overrides):
    load_config(DIGITS, overrides)
