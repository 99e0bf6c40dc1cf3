"""`dpt submit`: runs as jobs of a real cluster."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import yaml

from dpt_ray.cluster.jobs import runtime_environment
from dpt_ray.config import load_config
from dpt_ray.pipeline.flow import flow
from tests.helpers.paths import ROOT
from tests.helpers.processes import wait_until
from tests.helpers.tiny_run import TinyRun

MAIN = "import sys; from dpt_ray.cli import main; sys.exit(main())"


@pytest.fixture
def folder(tmp_path, tiny_overrides):
    """A folder with a configuration, elsewhere than the package, whose runs publish to `out` beside it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    config = load_config(ROOT / "configs" / "digits.yaml", [*tiny_overrides, f"output={tmp_path / 'out'}"])
    (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return folder


def start(cluster, folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, "submit", "run.yaml", *arguments],
        cwd=folder,
        env=os.environ | {"RAY_API_SERVER_ADDRESS": cluster.dashboard, "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def submit(cluster, folder, *arguments):
    """The exit code of `dpt submit run.yaml ...` in a folder, its output and its errors."""
    process = start(cluster, folder, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def client(cluster):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(cluster.dashboard)


def test_a_followed_job_prints_its_log_and_tells_what_it_is(cluster, folder):
    code, out, err = submit(cluster, folder, "name=followed", "--until", "index", "--follow")
    assert code == 0, out + err
    assert err.startswith("submitted: followed-1")
    assert "results: " in out
    config = load_config(folder / "run.yaml", ["name=followed"])
    index = flow(config)["index"]
    assert (folder.parent / "out" / "store" / index.artifact_name / index.digest / "manifest.json").exists()
    told = client(cluster).get_job_info("followed-1").metadata
    assert told["run"] == "followed"
    assert (told["stage"], told["identity"], told["attempt"]) == ("index", index.digest, "1")


def test_the_exit_code_is_the_jobs_own(cluster, folder):
    code, out, err = submit(cluster, folder, "name=refused", "output=/proc/none", "--until=index", "--follow")
    assert code == 2  # bad input, not the 1 of `ray job submit`
    assert "error: output: '/proc/none'" in out, err


def test_a_stopped_job_leaves_a_run_that_the_next_submit_continues(cluster, folder, tiny_overrides):
    arguments = ("name=stopped", "--until", "features", "--wait")
    run = TinyRun(folder.parent / "out", (*tiny_overrides, "name=stopped"))
    index = run.artifact("index")
    first = start(cluster, folder, *arguments)
    wait_until(lambda: index.published, first)
    client(cluster).stop_job("stopped-1")
    first.communicate(timeout=120)
    assert first.returncode == 143
    assert not run.artifact("features").published
    before = Path(index.path("manifest.json")).stat().st_mtime_ns
    code, out, err = submit(cluster, folder, *arguments)
    assert code == 0, out + err
    assert err.startswith("submitted: stopped-2")
    assert run.artifact("features").published
    assert Path(index.path("manifest.json")).stat().st_mtime_ns == before  # not made again


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["output=outputs"], "error: output: 'outputs' is relative, and the working folder"),
        (["output=null", "compute.autoscaling=true"], "error: output: missing, and the cluster adds nodes"),
        (["--until", "nothing"], "error: --until: 'nothing' is not a stage"),
        (
            ["--until", "train-diffusion"],
            "error: --until: 'train-diffusion' is not a stage of this configuration; `dpt train-diffusion` "
            "makes denoiser: --until denoiser; its stages are index",
        ),
        ([], "error: submit: no job server answers"),
    ],
)
def test_what_can_be_refused_here_is_refused_before_anything_is_uploaded(
    folder, dpt, monkeypatch, arguments, error
):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # nobody listens there
    code, _, said = dpt("submit", "run.yaml", *arguments)
    assert code == 2
    assert said.startswith(error)
    assert len(said.splitlines()) == 1


def test_a_configuration_outside_the_uploaded_folder_is_refused(folder, dpt, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    code, _, said = dpt("submit", folder / "run.yaml")
    assert code == 2
    assert "outside the current folder" in said


def test_outputs_environments_and_the_history_are_not_uploaded(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "mine"
    kept = {"run.yaml", "labels/few.csv", "notes/outputs.txt"}
    left = {".git/config", "outputs/store/x", "dpt_ray_outputs/x", ".venv/bin/python", "sub/.venv/x"}
    left |= {"a/__pycache__/x.pyc", ".mypy_cache/x", "x.egg-info/PKG-INFO"}
    for name in kept | left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    environment = runtime_environment(folder)
    archive = tmp_path / "package.zip"
    create_package(
        environment["working_dir"], archive, include_gitignore=True, excludes=environment["excludes"]
    )
    with zipfile.ZipFile(archive) as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == kept
    assert environment["py_modules"] == [str(ROOT / "dpt_ray")]
    assert "py_modules" not in runtime_environment(ROOT)  # the checkout has the package
    json.dumps(environment)


def test_a_base_outside_the_uploaded_folder_is_refused_by_name(folder, dpt, monkeypatch):
    own = folder / "own"
    own.mkdir()
    (own / "mine.yaml").write_text("base: ../run.yaml")
    monkeypatch.chdir(own)
    code, _, said = dpt("submit", "mine.yaml")
    assert code == 2 and len(said.splitlines()) == 1
    assert said.startswith("error: ../run.yaml (a base of mine.yaml): outside the current folder")


@pytest.mark.parametrize("token", [None, "not the cluster's"])
def test_a_submit_without_the_clusters_token_is_refused(cluster, folder, token, tmp_path):
    file = tmp_path / "wrong_token"
    if token:
        file.write_text(token)
    own = {"RAY_AUTH_TOKEN_PATH": str(file), "HOME": str(tmp_path)}
    process = start(cluster, folder, "name=stranger", "--wait", **own)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: submit: ") and len(err.splitlines()) == 1
    assert not any((job.submission_id or "").startswith("stranger") for job in client(cluster).list_jobs())


def test_the_job_server_takes_nothing_without_a_token(cluster):
    body = json.dumps({"entrypoint": "true", "submission_id": "stranger"}).encode()
    asked = urllib.request.Request(f"{cluster.dashboard}/api/jobs/", body, method="POST")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(asked)
    assert not any(job.submission_id == "stranger" for job in client(cluster).list_jobs())
