"""A study as a whole: what it writes, and what it says where its runs cannot be compared."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dpt_ray.cluster.session import usable_cpus
from dpt_ray.commands import study
from dpt_ray.config import ConfigError
from dpt_ray.config.study import load_study
from dpt_ray.engine.execute import StageError
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.output import open_store
from tests.helpers.paths import CONFIGS, DIGITS
from tests.helpers.processes import kill_session, session_pids, wait_until
from tests.helpers.runs import quiet
from tests.helpers.tiny_run import TINY


def write(folder, **section):
    path = folder / "study.yaml"
    section = {"labels_per_class": [1], "encoder_seeds": [0], "draws": 1} | section
    path.write_text(yaml.safe_dump({"base": str(DIGITS), "name": "s", "study": section}))
    return path


# These stand for a run, in the process that a study starts for it.
def killed(config):
    os.kill(os.getpid(), signal.SIGKILL)


def tells_threads(config):
    features = flow(config)["features"].artifact(open_store(config))
    encoder = features.store.artifact(*features.manifest["inputs"]["encoder"].split("/"))
    raise ConfigError(f"{encoder.manifest['threads']} threads made what {config.compute.threads} go on from")


def fails(config):
    (Path(config.output) / config.name).touch()
    raise ConfigError("cannot be")


def test_a_study_of_one_run_is_that_runs_table_without_errors(finished, tmp_path):
    run = finished.copy_to(tmp_path / "out")
    text = study.run_study(write(tmp_path), [*run.overrides, f"output={run.output}"], quiet())
    found = finished.artifact("evaluation").manifest["result"]["accuracy"]
    by_column = [found[i]["test"] for i in (0, 1, 2, 3, 5, 4)]  # the paper's setting is the last column
    assert "| 1 | " + " | ".join(f"{100 * value:.2f}" for value in by_column) + " |" in text
    gains = [found[5]["test"] - found[i]["test"] for i in range(4)]
    assert "| 1 | " + " | ".join(f"{100 * gain:+.2f} ({int(gain > 0)}/1)" for gain in gains) + " |" in text
    folder = run.output / "runs" / "s"
    assert (folder / "study.md").read_text() in text + "\n"
    assert np.asarray(Image.open(io.BytesIO((folder / "study.png").read_bytes()))).shape[:2] == (880, 2000)
    stored = tmp_path / "kept.json"
    (folder / "study.json").rename(stored)
    again = study.show_study(write(tmp_path), [*run.overrides, f"output={run.output}"], stored, quiet())
    assert again == text and (folder / "study.json").read_bytes() == stored.read_bytes()


def test_a_killed_process_is_no_runs_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_run_one", killed)
    monkeypatch.setattr(study, "_make_shared", lambda configs, display: None)
    path = write(tmp_path, draws=3, concurrent_runs=2)
    with pytest.raises(StageError) as caught:
        study.run_study(path, [f"output={tmp_path}"], quiet())
    assert "killed" in str(caught.value) and "lower study.concurrent_runs (2)" in str(caught.value)
    assert "s-n1" not in str(caught.value)


def test_after_a_run_that_fails_no_further_one_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_run_one", fails)
    with pytest.raises(ConfigError, match="run s-n1-e0-d0: cannot be"):
        study.run_study(write(tmp_path, draws=5), [f"output={tmp_path}"], quiet())
    assert [path.name for path in tmp_path.glob("s-n1*")] == ["s-n1-e0-d0"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: "),
        ("{", "cannot be read: "),
        ("[]", "is not a study.json; give the one that `dpt study` wrote"),
        ('{"command": "", "seconds": 1, "code": "", "runs": {}}', "lacks run s-n1-e0-d0 (2 of 2 runs of "),
    ],
)
def test_results_of_another_study_are_refused_in_one_line(tmp_path, content, words):
    results = tmp_path / "study.json"
    if content is not None:
        results.write_text(content)
    with pytest.raises(ConfigError) as caught:
        study.show_study(write(tmp_path, draws=2), [f"output={tmp_path / 'out'}"], results, quiet())
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_share_what_no_label_changes():
    _, configs = load_study(CONFIGS / "digits_study.yaml", ["study.encoder_seeds=[0, 1]", "study.draws=2"])
    of_encoder, others = {"encoder", "features", "graph"}, {"autoencoder", "moments", "referee"}
    assert {name: set(nodes) for name, nodes in study.shared(configs).items()} == {
        "digits-study-n1-e0-d0": of_encoder | others | {"index", "referee_features"},
        "digits-study-n1-e1-d0": of_encoder,
    }
    alone = {"digits-study-n1-e0-d0": configs["digits-study-n1-e0-d0"]}
    assert not study.shared(alone)


def test_what_runs_share_is_made_before_them_with_all_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_run_one", tells_threads)
    path = write(tmp_path, draws=2, concurrent_runs=2)
    settings = [
        *TINY,
        "compute.threads=null",
        "evaluate.referee=null",
        "generate_in=features",
        f"output={tmp_path / 'out'}",
    ]
    with pytest.raises(ConfigError) as caught:
        study.run_study(path, settings, quiet())
    cpus = usable_cpus()
    assert f"{cpus} threads made what {max(1, cpus // 2)} go on from" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.test=0", r"^run s-n1-e0-d0: no labelled test images to compare methods on; set data\.test"),
        ("study.labels_per_class=[1, 9]", r"^run s-n9-e0-d0: study\.labels_per_class: class 0 has \d "),
    ],
)
def test_labels_that_a_later_run_would_miss_are_told_before_the_first(tmp_path, monkeypatch, override, said):
    for name in (f"{label}/{number}.png" for label in range(10) for number in range(6)):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / name)
    images = f"data={{source: folder, uri: {tmp_path}/images, test: 20}}"
    monkeypatch.setattr(study, "_run_all", None)
    with pytest.raises(ConfigError, match=said):
        study.run_study(write(tmp_path), [images, f"output={tmp_path}", override], quiet())


def test_the_processes_of_a_killed_study_end_with_it(tmp_path):
    settings = [*TINY, "pretrain.steps=100000", "pretrain.log_every=1000", f"output={tmp_path / 'out'}"]
    started = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dpt_ray.cli",
            "study",
            str(write(tmp_path)),
            *settings,
            f"output={tmp_path / 'out'}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        encoders = tmp_path / "out" / "store" / "encoder"
        wait_until(lambda: any(encoders.glob("*/started.json")), started)
        assert len(session_pids(started.pid)) > 1
        started.kill()
        started.wait()
        end = time.monotonic() + 60
        while left := session_pids(started.pid):
            assert time.monotonic() < end, left
            time.sleep(0.1)
    finally:
        kill_session(started)
