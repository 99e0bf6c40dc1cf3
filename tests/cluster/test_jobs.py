"""Submitting and following jobs, against a job server that answers as told."""

from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from dpt_ray.cluster import jobs
from dpt_ray.config import ConfigError
from dpt_ray.engine.errors import StageError

METADATA = {"run": "digits", "stage": "report", "identity": "abc"}
TAKEN = "Request failed with status code 400: ValueError: Job with submission_id {} already exists. Please"


class Server:
    """A job server: `had` are its jobs so far, id to (status, metadata); `refuses` is raised for others."""

    def __init__(self, had=(), refuses=None):
        self.had, self.refuses, self.submitted = dict(had), refuses, []

    def submit_job(self, submission_id, metadata, **how):
        self.submitted.append(submission_id)
        if submission_id in self.had:
            raise RuntimeError(TAKEN.format(submission_id))
        if self.refuses:
            raise self.refuses
        self.had[submission_id] = (JobStatus.PENDING, metadata)

    def get_job_info(self, job):
        status, metadata = self.had[job]
        return SimpleNamespace(status=status, metadata=metadata, driver_exit_code=None)


def submit(server, tmp_path, **changes):
    return jobs.submit(server, "digits", ["python"], METADATA | changes, tmp_path)


def test_a_run_is_submitted_under_its_name_and_the_next_free_attempt(tmp_path):
    server = Server()
    assert submit(server, tmp_path) == jobs.Job("digits-1", joined=False)
    assert server.had["digits-1"][1] == METADATA | {"attempt": "1"}
    for ended in (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED):
        last = server.submitted[-1]
        server.had[last] = (ended, server.had[last][1])
        job = submit(server, tmp_path)
        assert not job.joined
    assert job.id == "digits-4"


def test_a_job_that_goes_on_is_joined_by_the_same_run_and_refused_to_another(tmp_path):
    server = Server({"digits-1": (JobStatus.FAILED, {}), "digits-2": (JobStatus.RUNNING, METADATA)})
    assert submit(server, tmp_path) == jobs.Job("digits-2", joined=True)
    with pytest.raises(ConfigError, match=r"digits-2 .* its identity is 'abc', not .other.; .*`ray job stop"):
        submit(server, tmp_path, identity="other")
    assert set(server.submitted) == {"digits-1", "digits-2"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Request failed with status code 500: Traceback ...\nOSError: no space left."),
        RuntimeError(TAKEN.format("digits-11")),  # another job's
        ConnectionError("reset by peer"),
        ValueError("Package size (600MiB) exceeds the maximum size of 512MiB"),
    ],
)
def test_nothing_but_a_taken_id_leads_to_another_attempt(tmp_path, error):
    server = Server(refuses=error)
    with pytest.raises(ConfigError, match="digits-1 was not accepted: "):
        submit(server, tmp_path)
    assert server.submitted == ["digits-1"]


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(jobs, "time", clock)
    return clock


class Running(Server):
    """A job that runs until `ends`, on a server that does not answer in the `silent` spans of time."""

    def __init__(self, clock, ends, silent=(), error=None):
        self.clock, self.ends, self.silent = clock, ends, silent
        self.error = error or ConnectionError("refused")

    def get_job_info(self, job):
        if any(start <= self.clock.now < end for start, end in self.silent):
            raise self.error
        status = JobStatus.SUCCEEDED if self.clock.now >= self.ends else JobStatus.RUNNING
        return SimpleNamespace(status=status, driver_exit_code=0)

    def get_job_logs(self, job):
        return "".join(f"line {n}\n" for n in range(int(min(self.clock.now, self.ends)) // 1000 + 1))


def test_following_survives_many_silences_each_shorter_than_the_patience(clock):
    part = jobs.PATIENCE - 2 * jobs.POLL
    silent = [(start, start + part) for start in range(1000, 20_000, 1000)]
    assert jobs.wait(Running(clock, 20_000, silent), "digits-1") == 0
    assert clock.now >= 20_000


def test_patience_counts_from_the_last_answer(clock):
    with pytest.raises(StageError, match=r"digits-1: no answer for 300 s \(refused\); it may still be run"):
        jobs.wait(Running(clock, 90_000, [(50_000, 90_000)]), "digits-1")
    assert 50_000 + jobs.PATIENCE - jobs.POLL <= clock.now <= 50_000 + jobs.PATIENCE + 2 * jobs.POLL


def test_a_job_that_the_server_forgot_ends_the_wait_at_once(clock):
    error = RuntimeError("Request failed with status code 404: Job digits-1 does not exist.")
    with pytest.raises(StageError, match="does not know it any more"):
        jobs.wait(Running(clock, 9000, [(100, 9000)], error), "digits-1")
    assert clock.now < 110


def test_each_part_of_the_log_is_passed_on_once(clock):
    parts = []
    assert jobs.wait(Running(clock, 4000, [(1500, 1700)]), "digits-1", parts.append) == 0
    assert "".join(parts) == "line 0\nline 1\nline 2\nline 3\nline 4\n"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),  # killed
        (JobStatus.FAILED, None, 1),  # did not start
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_the_exit_code_is_that_of_the_jobs_command(status, code, expected):
    assert jobs.exit_code(SimpleNamespace(status=status, driver_exit_code=code)) == expected
