"""What an object store answers that is neither a file nor that there is none."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpt_ray.store.artifact import Artifact
from dpt_ray.store.checkpoints import load_checkpoint
from dpt_ray.store.filesystem import url_to_fs


@pytest.fixture
def answering(monkeypatch):
    """Starts an S3 server that answers every request with a code and its reason."""
    s3fs = pytest.importorskip("s3fs")
    servers = []

    class Answer(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            code, reason = self.server.answer
            body = b"" if self.command == "HEAD" else f"<Error><Code>{reason}</Code></Error>".encode()
            self.send_response(code)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Nothing on the terminal."""

    for verb in ("GET", "HEAD"):
        setattr(Answer, f"do_{verb}", Answer.answer)

    def start(code, reason):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        server.answer = (code, reason)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's; s3fs has its own
        url_to_fs("s3://a-bucket")  # which sets the patience once
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
    s3fs.S3FileSystem.clear_instance_cache()


READERS = {
    "a copy": lambda artifact: artifact.local_file("w.bin"),
    "its content": lambda artifact: artifact.read_bytes("w.bin"),
    "whether it is there": lambda artifact: artifact.exists("w.bin"),
    "a checkpoint": load_checkpoint,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_bucket_that_denies_reading_is_told_in_one_line_naming_it_and_the_permission(answering, read):
    answering(403, "AccessDenied")
    with pytest.raises(
        ValueError, match=r"s3://a-bucket/out/\S+: denied .* a-bucket .*s3:GetObject"
    ) as caught:
        read(Artifact("s3://a-bucket/out"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_storage_that_is_busy_is_no_file_that_is_not_there(answering, read):
    answering(503, "SlowDown")
    with pytest.raises(OSError):  # no ValueError, which would end a training for good
        read(Artifact("s3://a-bucket/out"))
