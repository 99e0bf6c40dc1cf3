"""Processes that a test starts, waits for and kills: only its own, found by their session."""

import contextlib
import os
import signal
import time
from pathlib import Path


def wait_until(condition, process, seconds=120):
    """Looks every few milliseconds, while `process` lives, until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with exit code {process.returncode} before its time"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.003)


def kill_group(process):
    """SIGKILL to a process that leads its group, and all of the group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session_pids(session):
    """The live processes of a session: what its leader started, and what those did."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(pid) == session and command_line(pid):  # a zombie has no command line
                found.append(pid)
    return found


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def kill_session(leader):
    """SIGKILL to every process of the session that `leader` was started with."""
    while pids := session_pids(leader.pid):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        leader.poll()
        time.sleep(0.05)
    leader.wait()
