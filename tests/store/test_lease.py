"""One writer for an identity, whoever waits, dies or stalls."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import pytest
from botocore.exceptions import EndpointConnectionError

from dpt_ray.store import lease
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.lease import NAME, Lease, live_holders

ELSEWHERE = {"host": "another-machine", "pid": 1, "token": "t", "beat": 1}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "POLL", 0.02)
    monkeypatch.setattr(lease, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lease, "LIFETIME", 1.0)


@pytest.fixture(params=["local", "memory"])
def artifact(request, tmp_path, node):
    if request.param == "local":
        return Artifact(str(tmp_path / "artifact"))
    return Artifact(f"memory://{uuid.uuid4().hex}")


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def dead(**changes):
    """The lease of a process of this machine that is gone."""
    there = {"host": socket.gethostname(), "processes": lease._processes()}
    return {**there, "pid": dead_pid(), "token": "t", "beat": 1, **changes}


def waited(artifact, seconds=10.0):
    """The holders that a waiter was told of before it got the lease."""
    told = []
    done = threading.Event()

    def take():
        with Lease(artifact, told.append):
            done.set()

    threading.Thread(target=take, daemon=True).start()
    assert done.wait(seconds), "the lease was never taken over"
    return told


def test_a_lease_is_a_file_while_it_is_held(artifact):
    with Lease(artifact) as held:
        content = artifact.read_json(NAME)
        assert (content["host"], content["pid"]) == (socket.gethostname(), os.getpid())
        assert held.held
    assert not artifact.exists(NAME)
    assert not held.held


def test_a_lease_ends_with_an_error_in_its_block(artifact):
    with pytest.raises(RuntimeError), Lease(artifact):
        raise RuntimeError
    assert not artifact.exists(NAME)


def most_inside(artifact, workers, seconds):
    """How many of the threads that each want the lease for some seconds held it at once."""
    inside, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        with Lease(artifact):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(seconds)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most


def test_threads_exclude_each_other(artifact):
    assert most_inside(artifact, workers=5, seconds=0.03) == 1


def test_who_waits_is_told_of_the_holder(artifact):
    told = threading.Event()
    holders = []

    def wait():
        with Lease(artifact, lambda holder: (holders.append(holder), told.set())):
            pass

    with Lease(artifact):
        waiter = threading.Thread(target=wait)
        waiter.start()
        assert told.wait(10)
        assert holders[0] == f"process {os.getpid()} on {socket.gethostname()}"
        assert waiter.is_alive()
    waiter.join(10)
    assert not waiter.is_alive()


CHILD = """
    import os, sys, time
    from dpt_ray.store import lease
    from dpt_ray.store.artifact import Artifact
    lease.POLL, lease.HEARTBEAT = 0.02, 0.05
    with lease.Lease(Artifact(sys.argv[1])):
        print("held", flush=True)
        if sys.argv[2] == "stay":
            time.sleep(60)
        for _ in range(20):  # a read, a pause and a write that only one process may be in
            with open(sys.argv[2]) as file:
                count = int(file.read())
            time.sleep(0.002)
            with open(sys.argv[2], "w") as file:
                file.write(str(count + 1))
"""


def start(artifact, argument):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), artifact.uri, str(argument)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_exclude_each_other(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(Artifact(str(tmp_path / "artifact")), counter) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert counter.read_text() == "60"


def test_the_lease_of_a_killed_process_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LIFETIME", 1000.0)
    artifact = Artifact(str(tmp_path / "artifact"))
    process = start(artifact, "stay")
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert artifact.exists(NAME)
    waited(artifact)


def test_a_stale_lease_of_another_machine_is_taken_over_after_its_lifetime(artifact):
    artifact.write_json(NAME, ELSEWHERE)
    assert waited(artifact), "it was taken without waiting"


def test_a_lease_that_was_never_written_whole_runs_out(artifact):
    artifact.write_bytes(NAME, b"")
    waited(artifact)
    artifact.write_bytes(NAME, b'{"host": ')
    assert set(waited(artifact)) == {"another process"}


def test_a_heartbeat_keeps_a_lease_beyond_its_lifetime(artifact):
    beats, other = [], threading.Event()

    def wait():
        with Lease(artifact, lambda holder: beats.append(artifact.read_json(NAME)["beat"])):
            other.set()

    with Lease(artifact) as held:
        threading.Thread(target=wait, daemon=True).start()
        assert not other.wait(2 * lease.LIFETIME)
        assert held.held
    assert other.wait(10)
    assert max(beats) > 5


@pytest.mark.parametrize("error", [OSError("away"), EndpointConnectionError(endpoint_url="http://s3")])
def test_a_heartbeat_outlives_a_storage_that_is_away_for_a_moment(artifact, monkeypatch, error):
    with Lease(artifact) as held:
        with monkeypatch.context() as broken:

            def away(*args):
                raise error

            broken.setattr(Artifact, "write_bytes", away)
            time.sleep(4 * lease.HEARTBEAT)
        before = artifact.read_json(NAME)["beat"]
        time.sleep(6 * lease.HEARTBEAT)
        assert artifact.read_json(NAME)["beat"] > before
        assert held.held


def test_a_lease_that_was_taken_over_is_not_removed_by_who_lost_it(artifact):
    with Lease(artifact) as lost:
        artifact.write_json(NAME, ELSEWHERE)
        assert not lost.held
        time.sleep(3 * lease.HEARTBEAT)
    assert artifact.read_json(NAME) == ELSEWHERE


def test_who_lost_a_lease_is_told_to_whom_and_once(artifact):
    told = []
    with Lease(artifact, on_lost=told.append):
        artifact.write_json(NAME, ELSEWHERE)
        time.sleep(6 * lease.HEARTBEAT)
    assert told == ["process 1 on another-machine"]


def test_a_removed_lease_is_taken_again(artifact):
    told = []
    with Lease(artifact, on_lost=told.append) as held:
        artifact.fs.rm_file(artifact.path(NAME))
        time.sleep(6 * lease.HEARTBEAT)
        assert held.held
    assert not told


def test_a_lease_that_a_full_disk_leaves_empty_is_removed(tmp_path, monkeypatch):
    artifact = Artifact(str(tmp_path / "artifact"))

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Lease, "_content", full)
    with pytest.raises(OSError, match="No space"), Lease(artifact):
        pass
    assert not artifact.exists(NAME)


def test_a_pid_of_another_container_says_nothing_of_its_process(artifact):
    for elsewhere in (dead(processes="another boot pid:[1]"), dead(processes=None)):
        artifact.write_json(NAME, elsewhere)
        assert not lease._is_dead(artifact.read_bytes(NAME))
    artifact.write_json(NAME, dead())
    assert lease._is_dead(artifact.read_bytes(NAME))


def test_only_a_lease_with_a_heartbeat_is_alive(artifact, monkeypatch):
    assert live_holders({"it": artifact}) == {}
    with Lease(artifact):
        assert live_holders({"it": artifact}) == {"it": f"process {os.getpid()} on {socket.gethostname()}"}
    artifact.write_json(NAME, ELSEWHERE)
    assert live_holders({"it": artifact}) == {}  # after its lifetime
    monkeypatch.setattr(lease, "LIFETIME", 1000.0)
    artifact.write_json(NAME, dead())
    assert live_holders({"it": artifact}) == {}  # at once


def test_two_who_judge_a_holder_dead_at_the_same_moment_still_exclude_each_other(artifact, monkeypatch):
    # The slower of the two removes what it takes for the dead lease: the new one of the quicker.
    monkeypatch.setattr(lease, "POLL", 0.3)
    judged, created, calls = threading.Barrier(2), threading.Event(), iter(range(100))
    real_remove, real_create = Lease._remove, Lease._create

    def remove(self):
        call = next(calls)
        if call < 2:
            judged.wait(10)
        if call == 1:
            assert created.wait(10)
        real_remove(self)

    def create(self):
        done = real_create(self)
        if done:
            created.set()
        return done

    monkeypatch.setattr(Lease, "_remove", remove)
    monkeypatch.setattr(Lease, "_create", create)
    artifact.write_json(NAME, dead())
    assert most_inside(artifact, workers=2, seconds=0.6) == 1
