"""Object stores on this machine: an S3-compatible server, and a Hugging Face hub in memory."""

import contextlib
import http.client
import logging
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from fsspec.implementations.memory import MemoryFileSystem


@contextlib.contextmanager
def object_store():
    """An S3-compatible server: the environment that leads to it, set in this process too."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield environment
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()


class Faulty(ThreadingHTTPServer):
    """A proxy of an object store that fails: some requests at random, and all of them for a while.

    A fault is 503, 500, or an object whose second half does not come. `outage(seconds)` lets every request
    fail for so long.
    """

    def __init__(self, endpoint, share, seed):
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.behind, self.share, self.random = urlsplit(endpoint).netloc, share, random.Random(seed)
        self.faults, self.out_until = Counter(), 0.0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def outage(self, seconds):
        self.out_until = time.monotonic() + seconds

    def fault(self):
        """What happens to the next request, None for nothing."""
        if time.monotonic() < self.out_until:
            return "503"
        if self.random.random() < self.share:
            return self.random.choice(["503", "500", "cut"])
        return None


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.server.fault()
        self.server.faults[fault] += 1
        if fault in ("503", "500"):
            return self._send(int(fault), [], b"<Error><Code>SlowDown</Code></Error>")
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        data, headers = answer.read(), answer.getheaders()
        connection.close()
        return self._send(answer.status, headers, data, cut=fault == "cut" and len(data) > 1)

    def _send(self, status, headers, data, cut=False):
        self.send_response(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of HEAD, which has no body
            elif name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.send_header("content-length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args):
        """Nothing on the terminal."""


for _verb in ("GET", "HEAD", "PUT", "POST", "DELETE"):
    setattr(_Proxy, f"do_{_verb}", _Proxy.forward)


class Hub(MemoryFileSystem):
    """A Hugging Face hub in memory: what is there is what a test has put there."""

    protocol = ("hf",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("hf://"))
