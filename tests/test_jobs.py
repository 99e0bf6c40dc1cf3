"""Jobs submitted to a running cluster."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import TinyRun


def submit(cluster, script, *arguments, **environment):
    """`ray job submit` as the scripts' docstrings say; the finished process."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(ROOT)),
            *("--runtime-env-json", json.dumps({"env_vars": environment})),
            *("--", "python", f"jobs/{script}", "--config", "configs/digits.yaml", *arguments),
        ],
        env=os.environ | {"RAY_API_SERVER_ADDRESS": cluster.dashboard},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_submitted_job_publishes_the_report(cluster, tiny_overrides, tmp_path):
    # No ladder, controls and referee: fewer passes over the same code.
    settings = (*tiny_overrides, "ladder=null", "evaluate.controls=false", "evaluate.referee=null")
    # Nor an output: on one machine the home folder keeps it.
    done = submit(cluster, "run_pipeline.py", *settings, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    run = TinyRun(tmp_path / "dpt_ray_outputs", settings)
    assert all(run.artifact(name).published for name in run.nodes())
    assert (tmp_path / "dpt_ray_outputs" / "runs" / "digits" / "report.html").exists()


def test_a_job_without_its_token_is_refused(cluster, tmp_path, monkeypatch):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    done = submit(cluster, "run_pipeline.py", f"output={tmp_path}")
    assert done.returncode != 0
    assert "token" in done.stderr.lower()


def test_a_job_with_a_relative_output_is_refused_with_the_reason(cluster):
    done = submit(cluster, "run_pipeline.py", "output=outputs")
    assert done.returncode == 1
    assert "output: 'outputs' is relative" in done.stdout + done.stderr
    assert "give an absolute path or URI" in done.stdout + done.stderr


@pytest.mark.parametrize("script", ["run_pipeline.py", "run_study.py", "run_sweep.py"])
def test_a_job_script_says_a_bad_configuration_in_one_line(script, tmp_path):
    done = subprocess.run(
        [sys.executable, f"jobs/{script}", "--config", str(tmp_path / "none.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "none.yaml: no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
