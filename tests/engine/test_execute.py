"""How a step is made and published, with a maker that is the test's."""

import json
import signal
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import pytest

import dpt_ray
from dpt_ray.config.sections import Compute
from dpt_ray.engine.code_version import code_version
from dpt_ray.engine.errors import StageError
from dpt_ray.engine.execute import execute
from dpt_ray.store import lease
from dpt_ray.store.artifact import Store
from tests.helpers.runs import quiet
from tests.helpers.toy import toy_node


@pytest.fixture
def made(tmp_path):
    """Executes nodes, one unless named, whose maker returns some facts; the first one's artifact."""

    def execute_one(meanwhile=lambda: None, names=("toy",), **facts):
        nodes = [toy_node(name, make=lambda: meanwhile() or facts, group=names[0]) for name in names]
        store = Store(str(tmp_path))
        execute(nodes, store, Compute(), quiet(), {})
        return nodes[0].artifact(store)

    return execute_one


def test_a_manifest_that_cannot_be_written_fails_its_stage_in_one_line(made):
    with pytest.raises(StageError, match=r"^toy: ValueError: Out of range float values") as caught:
        made(loss=float("nan"))
    assert "\n" not in str(caught.value)
    assert made(loss=0.5).manifest["loss"] == 0.5


@pytest.fixture
def interrupts():
    """The interrupts of this process, which a shell's background job, as a test run may be, ignores."""
    seen = []

    def interrupt(number, frame):
        seen.append(number)
        if len(seen) == 1:
            time.sleep(0.5)  # a second one would come now
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    yield seen
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("names", [["toy"], ["toy", "other"]])
def test_a_step_that_another_process_took_over_ends_and_leaves_the_lease_to_it(
    names, made, tmp_path, monkeypatch, interrupts
):
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    other = json.dumps({"host": "another-machine", "pid": 1, "token": "t", "beat": 1})

    def lose():
        leases = list(tmp_path.rglob(lease.NAME))
        for _ in range(200):  # what a suspended process goes on with
            for held in leases:
                taken = held.with_suffix(".new")
                taken.write_text(other)
                taken.replace(held)  # again, where a heartbeat was just on its way
            time.sleep(0.05)

    started = time.monotonic()
    with pytest.raises(StageError, match=r"^toy: process 1 on another-machine has taken this over, since "):
        made(lose, names)
    assert time.monotonic() - started < 5
    assert [held.read_text() for held in tmp_path.rglob(lease.NAME)] == [other] * len(names)
    assert len(interrupts) == 1  # a second one ends a command on the spot


def test_ctrl_c_is_no_lost_lease(made):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(interrupt)


@pytest.fixture
def installed_in(monkeypatch):
    """Lets the package lie in a folder."""

    def install(folder):
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(dpt_ray, "__file__", str(folder / "dpt_ray" / "__init__.py"))
        code_version.cache_clear()

    yield install
    code_version.cache_clear()


@pytest.fixture
def repository(tmp_path):
    """A repository of one commit."""
    git(tmp_path, "init", "-q")
    git(tmp_path, *COMMIT)
    return tmp_path


COMMIT = ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "one")


def git(folder, *arguments):
    shown = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return shown.stdout.strip()


def test_the_code_is_the_commit_of_its_own_checkout_as_the_work_began(installed_in, repository, made):
    commit = git(repository, "rev-parse", "--short", "HEAD")
    installed_in(repository)
    assert made(meanwhile=lambda: git(repository, *COMMIT)).manifest["code"] == commit


def test_the_code_of_a_package_in_another_repository_is_its_version(installed_in, repository):
    installed_in(repository / ".venv" / "site-packages")
    assert code_version() == version("dpt_ray")


def test_without_git_the_code_is_the_version(installed_in, repository, made, monkeypatch):
    monkeypatch.setenv("PATH", str(repository))
    installed_in(repository)
    assert made().manifest["code"] == version("dpt_ray")


def test_a_folder_without_git_that_is_not_installed_has_no_version(installed_in, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("dpt_ray.engine.code_version.version", missing)
    installed_in(tmp_path)
    assert code_version() == "unknown"
