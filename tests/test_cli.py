"""`dpt` as a person meets it: help, plans, listings, and one line for each mistake."""

import os
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dpt_ray.cli import STAGES, app
from dpt_ray.commands import predict
from dpt_ray.commands.outputs import remove_outputs
from dpt_ray.stages.index import Index
from dpt_ray.store import lease
from dpt_ray.store.artifact import Store
from tests.helpers.paths import DIGITS
from tests.helpers.processes import wait_until
from tests.helpers.tables import row

PROGRESS = re.compile(r"\[\d+/\d+\] (index|labels): ")


# Help ----------------------------------------------------------------------------------------------

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def test_there_is_a_command_for_each_part_of_the_flow():
    designed = {"run", "init", "plan", "status", "study", "suggest", "predict", "export", "list", "remove"}
    assert designed | set(STAGES) <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert f" {command} " in result.output
    assert "Arguments" in result.output


def test_help_without_a_command_lists_them_all():
    output = CliRunner().invoke(app, ["--help"]).output
    assert all(command in output for command in COMMANDS)


# Mistakes ------------------------------------------------------------------------------------------


MISTAKES = [
    *("unknown key", "wrong type", "no value"),
    *("too many labels", "unknown image", "no label list", "no images", "output"),
    "unknown encoder",
]


def mistakes(folder):
    """(arguments after `dpt run configs/digits.yaml`, what the one line must say)."""
    (folder / "file").touch()
    (folder / "few.csv").write_text("id,label\nno-such-image,1\n")
    listed = ["labels.per_class=null", f"labels.file={folder / 'few.csv'}"]
    return {
        "unknown key": (["generate.gidance=2"], ["generate.gidance: 2", "did you mean generate.guidance?"]),
        "wrong type": (["pretrain.steps=many"], ["pretrain.steps: 'many'", "should be a valid integer"]),
        "too many labels": (["labels.per_class=500"], ["labels.per_class", "500 per class", "ask for fewer"]),
        "output": ([f"output={folder}/file/out"], [f"output: '{folder}/file/out'", "choose another folder"]),
        "unknown image": (listed, ["labels.file", "line 2", "'no-such-image'", "correct or remove the line"]),
        "no label list": (
            ["labels.per_class=null", "labels.file=/none.csv"],
            ["labels.file: /none.csv", "give the path or URI of an existing file"],
        ),
        "no images": (["data.source=tar", "data.uri=/none"], ["data.uri: '/none'", "check the path"]),
        "unknown encoder": (
            ["data.mode=RGB", "encoder.kind=timm", "encoder.name=vit_base_patch16_224.nosuch"],
            ["encoder.name: ", "'vit_base_patch16_224.nosuch'", "timm.list_pretrained()"],
        ),
        "no value": (["pretrain.steps"], ["override 'pretrain.steps'", "write key.path=value"]),
    }


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(dpt, tmp_path, kind):
    overrides, parts = mistakes(tmp_path)[kind]
    code, out, err = dpt("run", DIGITS, f"output={tmp_path}/out", *overrides)
    assert code == 2
    lines = [line for line in err.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0]
    assert out == "" and "Traceback" not in err
    made = Store(f"{tmp_path}/out").all_artifacts()
    assert {stage for stage, _, _ in made} <= {"index", "labels"}  # what the labels are checked against


def test_a_mistake_looks_the_same_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "dpt_ray.cli", "run", DIGITS, "generate.gidance=2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: .*: generate\.gidance: 2: .*generate\.guidance\?\n", result.stderr)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named(dpt, tmp_path):
    code, _, err = dpt("plan", tmp_path / "none.yaml")
    assert code == 2 and err == f"error: {tmp_path / 'none.yaml'}: no such file; check the path\n"


@pytest.mark.parametrize("command", ["run", "plan", "index"])
def test_a_submitted_job_is_refused_a_relative_output(dpt, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_ID", "raysubmit_1")
    code, _, err = dpt(command, DIGITS, "output=results")
    assert code == 2
    assert err.startswith("error: output: 'results' is relative") and err.count("\n") == 1
    assert "removed after it" in err and "absolute path or URI" in err
    assert not list(tmp_path.iterdir())


def test_a_stage_that_fails_is_one_line_and_says_how_to_go_on(dpt, monkeypatch, tmp_path):
    def fails(task):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(Index, "make", fails)
    code, _, err = dpt("index", DIGITS, f"output={tmp_path}")
    assert code == 1
    assert err.splitlines()[0] == "failed: index: RuntimeError: the disk is gone"
    assert "same command again" in err and "Traceback" not in err


def test_ctrl_c_is_one_line_and_a_second_one_waits_for_nothing(tmp_path):
    hangs = (
        "import sys, time\n"
        "from dpt_ray import cli\n"
        "from dpt_ray.stages.index import Index\n"
        "def make(task):\n"
        "    try:\n"
        f"        open({str(tmp_path / 'making')!r}, 'w').close()\n"
        "        while True: time.sleep(0.1)\n"
        "    finally:\n"  # what is closed in order never comes to an end
        f"        while {{hangs}}: open({str(tmp_path / 'closing')!r}, 'w').close(); time.sleep(0.1)\n"
        "Index.make = make\n"
        f"sys.argv = ['dpt', 'index', {str(DIGITS)!r}, {f'output={tmp_path}/out'!r}]\n"
        "cli.main()"
    )
    for twice in (False, True):
        code = hangs.format(hangs=twice)
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        wait_until((tmp_path / "making").exists, process)
        process.send_signal(signal.SIGINT)
        (tmp_path / "making").unlink()
        if twice:
            wait_until((tmp_path / "closing").exists, process)
            process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert error.splitlines()[-1] == "stopped; run the same command again to continue"
        assert "Traceback" not in error


def test_what_is_done_is_not_done_again(dpt, tmp_path):
    output = f"output={tmp_path}"
    dpt("index", DIGITS, output)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.parquet")}
    assert len(before) == 2
    code, out, err = dpt("index", DIGITS, output, "compute.threads=2", "diffusion.log_every=1")
    assert code == 0 and "Nothing to do" in out
    assert "index: done before" in err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.parquet")}


# Outputs -------------------------------------------------------------------------------------------


@pytest.fixture
def outputs(tmp_path):
    """A made-up output folder: run `one` has done a, run `two` is on its way to b, c is nobody's."""
    store = Store(str(tmp_path / "out"))
    for name, size in (("a", 3000), ("b", 20), ("c", 100)):
        artifact = store.artifact("stage", name)
        artifact.write_bytes("data.bin", bytes(size - 2))
        artifact.publish({})  # two bytes
    store.run_folder("one").write_json("artifacts.json", {"x": "stage/a@k1"})
    store.run_folder("two").write_json("planned.json", {"x": "stage/a@k2", "y": "stage/b"})
    return store


def test_list_shows_sizes_and_the_runs_that_need_them(dpt, outputs):
    code, out, _ = dpt("list", outputs.uri)
    assert code == 0
    assert row(out, "stage/a") == ["stage/a", "3.0 kB", "one, two"]
    assert row(out, "stage/b") == ["stage/b", "20 bytes", "two"]
    assert row(out, "stage/c") == ["stage/c", "100 bytes", "-"]
    assert "3.1 kB in all" in out


def test_remove_unused_leaves_what_runs_refer_to_or_are_making(dpt, outputs):
    code, out, _ = dpt("remove", outputs.uri, "--unused", "--yes")
    assert code == 0 and "removed 1 artifacts (100 bytes)" in out
    assert outputs.digests("stage") == ["a", "b"]


def test_remove_takes_names_and_asks_first(dpt, outputs, monkeypatch):
    declined = CliRunner().invoke(app, ["remove", outputs.uri, "stage/a"], input="n\n")
    assert declined.exit_code == 1 and "Remove 1 artifacts (3.0 kB)?" in declined.output
    assert outputs.digests("stage") == ["a", "b", "c"]
    assert CliRunner().invoke(app, ["remove", outputs.uri, "stage/a"], input="y\n").exit_code == 0
    assert outputs.digests("stage") == ["b", "c"]


def test_remove_without_names_says_how_to_remove_what_no_run_needs(dpt, outputs):
    code, out, err = dpt("remove", outputs.uri, "--yes")
    assert (code, out) == (2, "") and "STAGE/HASH, or --unused" in err and err.count("\n") == 1


def test_remove_leaves_what_a_run_came_to_need_while_the_question_was_asked(outputs):
    def begin(question):
        assert question == "Remove 1 artifacts (100 bytes)?"
        outputs.run_folder("three").write_json("planned.json", {"x": "stage/c"})

    assert remove_outputs(outputs.uri, [], True, begin) == "removed 0 artifacts (0 bytes)"
    assert outputs.digests("stage") == ["a", "b", "c"]


def test_remove_refuses_what_is_being_made_and_leaves_it_among_the_unused(dpt, outputs, monkeypatch):
    monkeypatch.setattr(lease, "POLL", 0.02)
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    with lease.Lease(outputs.artifact("stage", "c")):
        assert "removed 0 artifacts" in dpt("remove", outputs.uri, "--unused", "--yes")[1]
        code, out, err = dpt("remove", outputs.uri, "stage/a", "stage/c", "--yes")
    assert (code, out) == (2, "") and "stage/c is being made by process" in err and err.count("\n") == 1
    assert outputs.digests("stage") == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["stage/zzz", "../../etc", "stage"])
def test_remove_refuses_what_is_no_artifact(dpt, outputs, name):
    code, _, err = dpt("remove", outputs.uri, "stage/a", name, "--yes")
    assert code == 2 and f"has no {name}" in err and "dpt list" in err and err.count("\n") == 1
    assert outputs.digests("stage") == ["a", "b", "c"]


@pytest.mark.parametrize("command", [["list"], ["remove", "--unused", "--yes"]])
@pytest.mark.parametrize("output", ["/none", "nosuch://bucket"])
def test_a_folder_without_runs_is_named(dpt, command, output):
    code, _, err = dpt(*command, output)
    assert code == 2 and err.startswith(f"error: output: '{output}'") and err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        *(["plan", DIGITS], ["status", DIGITS], ["run", DIGITS], ["list"]),
        *(["export", DIGITS, "npz", "x.npz", "--set"], ["export-model", DIGITS, "safetensors", "x", "--set"]),
        ["predict", DIGITS, ".", "--set"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("output", "reason"),
    [("nosuch://y", "Protocol not known: nosuch"), ("s3://bucket/x", "Unable to locate credentials")],
)
def test_an_output_that_cannot_be_read_is_one_line(no_credentials, dpt, command, output, reason):
    code, out, err = dpt(*command, output if command == ["list"] else f"output={output}")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: output: {output!r} cannot be read ({reason}")
    assert "check the URI and the credentials" in err


@pytest.mark.parametrize(
    ("uri", "reason"), [("nosuch://y", "Protocol not known"), ("s3://bucket/x", "credentials")]
)
def test_images_that_cannot_be_read_are_one_line(no_credentials, dpt, tmp_path, monkeypatch, uri, reason):
    monkeypatch.setattr(predict, "load_labeller", lambda config, method: None)
    (tmp_path / "l.csv").write_text("id,label\na,b\n")
    for command, said in {
        ("init", uri, "--labels", tmp_path / "l.csv"): "error: init: ",
        ("predict", DIGITS, uri): f"error: images: {uri}: ",
    }.items():
        code, out, err = dpt(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(said) and reason in err


def test_a_tilde_is_the_home_folder(dpt, monkeypatch, tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert dpt("index", DIGITS, "output=~/dpt")[0] == 0
    assert (home / "dpt" / "store" / "index").is_dir() and not list(here.iterdir())
    assert "index/" in dpt("list", "~/dpt")[1]


def test_the_folder_of_a_run_forgets_what_an_earlier_configuration_made(dpt, tmp_path):
    dpt("index", DIGITS, f"output={tmp_path}")
    folder = tmp_path / "runs" / "digits"
    of_a_part = ["artifacts.json", "config.yaml", "planned.json"]
    assert sorted(path.name for path in folder.iterdir()) == of_a_part
    (folder / "denoiser").symlink_to(tmp_path / "gone")
    dpt("index", DIGITS, f"output={tmp_path}", "labels.seed=2")
    assert sorted(path.name for path in folder.iterdir()) == of_a_part
    assert "seed: 2" in (folder / "config.yaml").read_text()


def test_a_run_that_fails_keeps_what_it_rests_on_in_use(dpt, tmp_path):
    output = f"output={tmp_path}"
    assert dpt("index", DIGITS, output)[0] == 0
    assert dpt("index", DIGITS, output, "labels.per_class=500")[0] == 2
    code, out, _ = dpt("remove", tmp_path, "--unused", "--yes")
    assert code == 0 and "removed 0 artifacts" in out
    assert len(Store(str(tmp_path)).digests("index")) == 1


def test_in_a_log_no_table_is_cut(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    shown = subprocess.run(
        [sys.executable, "-m", "dpt_ray.cli", "status", str(DIGITS), f"output={tmp_path}"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "…" not in shown and "referee_sample_features" in shown
