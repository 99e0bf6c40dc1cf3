"""The speed of this machine, measured by real steps of a run's own networks."""

import math
from contextlib import nullcontext

import pytest
import torch

from dpt_ray.config import load_config
from dpt_ray.config.sections import Denoiser
from dpt_ray.models import precision
from dpt_ray.pipeline import speed
from dpt_ray.pipeline.speed import FitShape, machine_rates, measure_denoiser, measure_fit, measure_view
from tests.helpers.paths import CONFIGS, DIGITS


def test_the_rates_are_measured_and_leave_the_threads_as_they_were():
    before = torch.get_num_threads()
    rates = machine_rates(load_config(DIGITS), threads=1)
    assert 1e6 < rates.conv < 1e16 and 1e6 < rates.transformer < 1e16
    assert rates.fit is None
    assert torch.get_num_threads() == before


def test_the_rate_of_fits_is_measured_on_no_more_rows_than_there_are(monkeypatch):
    passes = []

    def one_second(step, tried):
        passes.append(step())
        return 1.0

    monkeypatch.setattr(speed, "_fastest", one_second)
    assert measure_fit(FitShape(1290, 64, 10), threads=1) == 1290 * 4 * 64 * 10
    large = measure_fit(FitShape(1_281_167, 768, 1000), threads=1)
    assert 0.9 * speed.SECONDS * speed.GUESS["fit"] < large <= speed.SECONDS * speed.GUESS["fit"]
    # At W = 0 every class is as likely: the loss is log C.
    assert [float(value) for value, _ in passes] == pytest.approx([math.log(10), math.log(1000)])


def test_views_are_measured_on_one_thread_and_leave_the_threads_as_they_were():
    before = torch.get_num_threads()
    small, large = measure_view("small_images", 32), measure_view("photographs", 224)
    assert 1e-6 < small < large < 1
    assert torch.get_num_threads() == before


def test_a_published_network_is_measured_on_few_images_and_layers(monkeypatch):
    steps = []

    def one_second(loss, precision, threads, device):
        steps.append(loss)
        return 1.0

    monkeypatch.setattr(speed, "_seconds", one_second)
    config = load_config(CONFIGS / "imagenet256_base.yaml")
    rates = machine_rates(config, threads=1)
    assert rates.transformer < 3e11  # operations of the one step: a few seconds of any processor
    assert len(steps) == 2


def test_where_bfloat16_is_emulated_a_step_is_measured_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: 0.02)
    seen = []
    monkeypatch.setattr(precision, "autocast", lambda device, kind: seen.append(kind) or nullcontext())
    monkeypatch.setattr(speed, "_fastest", lambda step, tried: step() or 1.0)
    model = Denoiser(patch_size=4, dim=8, depth=2, heads=2)
    emulated = measure_denoiser(model, 8, 1, "bfloat16", 1, "cpu")
    real = measure_denoiser(model, 8, 1, "float32", 1, "cpu")
    assert seen == ["float32", "float32"]
    assert emulated == pytest.approx(0.02 * real)


def test_a_measured_step_takes_as_many_images_as_the_time_allows(monkeypatch):
    monkeypatch.setattr(speed, "_seconds", lambda *arguments: 1.0)
    small = Denoiser(patch_size=4, dim=64, depth=2, heads=4)
    # The rate is then the operations of the step: of a batch of 64 at the most.
    whole = measure_denoiser(small, 8, 1, "float32", 1, "cpu")
    monkeypatch.setitem(speed.GUESS, "cpu", 1.0)
    assert whole == 64 * measure_denoiser(small, 8, 1, "float32", 1, "cpu")
