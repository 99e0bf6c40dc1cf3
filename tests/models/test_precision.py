"""What `precision: auto` means, and what is said where bfloat16 is emulated."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from dpt_ray.config import load_config
from dpt_ray.models import precision
from dpt_ray.pipeline.flow import flow
from tests.helpers.paths import DIGITS, ROOT

ALL = ("encoder", "autoencoder", "pretrain", "diffusion", "evaluate.referee")


@pytest.fixture
def measured(monkeypatch):
    """Let this machine measure such a gain; count how often it is asked for."""
    asked = []

    def tell(gain):
        monkeypatch.setattr(precision, "bfloat16_gain", lambda: asked.append(gain) or gain)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return asked

    return tell


def digits(value, *overrides):
    return load_config(DIGITS, [*(f"{section}.precision={value}" for section in ALL), *overrides])


@pytest.mark.parametrize(("gain", "chosen"), [(1.4, "bfloat16"), (0.4, "float32"), (0.02, "float32")])
def test_auto_makes_the_artifacts_of_the_precision_that_is_faster_here(measured, gain, chosen):
    measured(gain)
    auto, written_out = (flow(digits(value)) for value in ("auto", chosen))
    nodes = auto.keys() - {"report"}
    assert {name: auto[name].reference for name in nodes} == {
        name: written_out[name].reference for name in nodes
    }
    assert auto["denoiser"].settings.precision == auto["features"].settings.precision == chosen


def test_the_report_shows_the_configuration_as_it_was_written(measured):
    measured(0.02)
    assert "precision: auto" in flow(digits("auto"))["report"].unhashed["config"]


def test_what_runs_on_a_gpu_is_bfloat16_and_the_processor_is_not_asked(measured):
    asked = measured(0.02)
    resolved = precision.resolve_precisions(
        digits("auto", "compute.train_gpus=true", "compute.actor_gpus=0.5", "compute.train_workers=1")
    )
    found = [resolved.encoder, resolved.autoencoder, resolved.pretrain, resolved.diffusion]
    assert {section.precision for section in [*found, resolved.evaluate.referee]} == {"bfloat16"}
    assert not asked
    resolved = precision.resolve_precisions(digits("auto", "compute.actor_gpus=1"))
    assert (resolved.encoder.precision, resolved.diffusion.precision) == ("bfloat16", "float32")


@pytest.mark.parametrize("value", ["float32", "bfloat16"])
def test_what_is_written_out_is_taken_as_it_is_without_measuring(measured, value):
    asked = measured(0.02)
    config = digits(value)
    assert precision.resolve_precisions(config) is config and not asked


def test_emulated_bfloat16_is_told_with_its_factor_and_what_to_set(measured):
    measured(0.02)
    config = load_config(DIGITS, ["diffusion.precision=bfloat16", "encoder.precision=bfloat16"])
    note = precision.emulation_note(config)
    assert "50 times as long" in note and "\n" not in note
    assert "set encoder.precision=auto diffusion.precision=auto" in note
    assert not precision.emulation_note(load_config(DIGITS))
    assert not precision.emulation_note(digits("auto"))
    assert not precision.emulation_note(digits("bfloat16", "compute.train_gpus=true", "compute.actor_gpus=1"))
    measured(1.4)
    assert not precision.emulation_note(config)


def test_measuring_leaves_the_threads_and_everybodys_random_numbers_alone():
    threads, numbers = torch.get_num_threads(), torch.get_rng_state()
    assert 0 < precision.bfloat16_gain() < 100
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="limits x86 instruction sets")
def test_a_processor_with_avx2_only_is_found_slower_in_bfloat16_and_its_peak_is_measured_all_the_same():
    code = (
        "import torch\n"
        "from dpt_ray.models.precision import bfloat16_gain\n"
        "from dpt_ray.training.throughput import matmul_peak\n"
        "print(bfloat16_gain(), matmul_peak('cpu', torch.bfloat16))"
    )
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | limited,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    gain, peak = map(float, done.stdout.split())
    assert gain < 0.5 and peak > 0
