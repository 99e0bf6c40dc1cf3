"""Passing AWS's spot notice on to Ray, against a metadata service as EC2 documents it."""

import json
import socket
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from ray.scripts.scripts import cli

from dpt_ray.cluster import spot


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2: no answer without a token; 404 until a notice is given."""

    def do_PUT(self):
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if asked else 400, "a-token")

    def do_GET(self):
        if self.headers["X-aws-ec2-metadata-token"] != "a-token":
            self.answer(401)
        elif self.path != "/latest/meta-data/spot/instance-action" or not self.server.notices.pop(0):
            self.answer(404)
        else:
            end = datetime.now(UTC) + timedelta(hours=self.server.hours_ahead, seconds=120)
            self.answer(200, json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}))

    def answer(self, status, text=""):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    """A metadata service; `notices` says for each of the next questions whether one is given."""
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    server.notices, server.hours_ahead = [], 0
    server.url = f"http://127.0.0.1:{server.server_port}/latest"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("hours", [0, 5, -5])
def test_a_notice_is_passed_on_until_it_is_accepted_whatever_this_machines_clock(service, monkeypatch, hours):
    service.notices, service.hours_ahead = [False, False, True, True], hours
    monkeypatch.setattr(spot.time, "sleep", lambda seconds: None)
    commands, accepted = [], iter([False, True])

    def run(command):
        commands.append(command)
        return next(accepted)

    spot.watch("10.0.0.1:6379", service.url, run)
    assert service.notices == []
    assert len(commands) == 2
    options = dict(zip(commands[0][4::2], commands[0][5::2], strict=True))
    assert options["--address"] == "10.0.0.1:6379"
    assert options["--reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 90 <= int(options["--deadline-remaining-seconds"]) <= 110


def test_a_machine_that_is_not_aws_has_no_notice():
    assert not spot.notice("http://127.0.0.1:9/latest")  # nobody listens there


@pytest.mark.parametrize("sent", [b"", b"nonsense\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
def test_a_service_that_breaks_off_has_no_notice(sent):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            asked, _ = listening.accept()
            asked.recv(1000)
            asked.sendall(sent)
            asked.close()

        threading.Thread(target=answer, daemon=True).start()
        assert not spot.notice(f"http://127.0.0.1:{listening.getsockname()[1]}/latest")


def test_ray_has_the_command_and_its_options():
    _, _, _, command, *options = spot.drain_command("10.0.0.1:6379", 100.7)
    read = cli.commands[command].make_context(command, options).params
    assert read.pop("node_id") is None  # this node
    assert read == {
        "address": "10.0.0.1:6379",
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason_message": "spot notice",
        "deadline_remaining_seconds": 100,
    }
