"""The flow model of features against class-conditional Gaussians, whose means and covariances are known."""

import numpy as np
import pytest
import torch

from dpt_ray.diffusion.sampling import Sampling, image_noise, sample
from dpt_ray.diffusion.schedules import SCHEDULES
from dpt_ray.learners.denoise import feature_step
from dpt_ray.models.feature_denoiser import FeatureDenoiser, FeatureDenoiserConfig
from dpt_ray.training.loop import TrainSettings, train
from dpt_ray.training.workload import Hooks, Worker, Workload

MEANS = torch.tensor([[1.0, -0.5], [-1.2, 0.3]])
ROOTS = torch.tensor([[[0.5, 0.0], [0.3, 0.4]], [[0.3, 0.0], [-0.5, 0.6]]])  # L of the covariance L L^T
CONFIG = FeatureDenoiserConfig(dim=2, width=64, depth=2, num_classes=2)
ROWS, SAMPLES = 4096, 1000


@pytest.fixture(scope="module")
def trained():
    """The averaged weights after a training of seconds on rows of both classes, a quarter without a label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % 2
    normal = torch.randn(ROWS, 2, generator=generator)
    rows = MEANS[labels] + torch.einsum("nij,nj->ni", ROOTS[labels], normal)
    settings = TrainSettings(
        steps=1000, batch_size=256, learning_rate=3e-3, lr_schedule="cosine", ema_decay=0.99
    )

    def load(chosen, step):
        return {"feature": rows[chosen], "label": labels[chosen]}

    torch.manual_seed(0)
    model = FeatureDenoiser(CONFIG)
    step = feature_step(SCHEDULES["linear"], "flow", 2, label_dropout=0.25)
    model.load_state_dict(train(Workload(model, step, load, ROWS), settings, Worker(), Hooks()).ema)
    return model.eval(), rows


def draw(model, label):
    noise = torch.stack([image_noise(0, label, index, (2,)) for index in range(SAMPLES)])
    labels = torch.full((SAMPLES,), label)
    return sample(model, noise, labels, 2, Sampling("linear", "flow", "dpm_solver_pp_2m", 25)).numpy()


@pytest.mark.parametrize("label", [0, 1])
def test_samples_of_a_class_have_its_mean_and_covariance(trained, label):
    found = draw(trained[0], label)
    # Standard errors of 1,000 samples: 0.02 of a mean, 0.03 of a covariance of about 0.6; the rest is the
    # network's own error.
    np.testing.assert_allclose(found.mean(axis=0), MEANS[label], atol=0.1)
    covariance = (ROOTS[label] @ ROOTS[label].T).numpy()
    np.testing.assert_allclose(np.cov(found.T), covariance, atol=0.1)


def test_samples_of_the_null_class_are_those_of_all_rows(trained):
    model, rows = trained
    found = draw(model, 2)
    np.testing.assert_allclose(found.mean(axis=0), rows.mean(dim=0), atol=0.15)
    np.testing.assert_allclose(np.cov(found.T), np.cov(rows.numpy().T), atol=0.25)


def test_every_label_is_dropped_with_probability_1():
    """The loss then does not depend on the labels."""
    from dpt_ray.training.random import StepRandom

    torch.manual_seed(0)
    model = FeatureDenoiser(CONFIG)
    features = torch.randn(8, 2)

    def loss(labels, dropout):
        step = feature_step(SCHEDULES["linear"], "flow", 2, dropout)
        return step(model, {"feature": features, "label": labels}, StepRandom(0, 0, 0, 8)).item()

    zeros, ones = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    assert loss(zeros, 1.0) == loss(ones, 1.0) and loss(zeros, 0.0) != loss(ones, 0.0)
