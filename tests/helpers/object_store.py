"""Object stores on this machine: an S3-compatible server, and a Hugging Face hub in memory."""

import contextlib
import logging

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


class Hub(MemoryFileSystem):
    """A Hugging Face hub in memory: what is there is what a test has put there."""

    protocol = ("hf",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("hf://"))
