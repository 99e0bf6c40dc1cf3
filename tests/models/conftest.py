"""A Hugging Face hub in memory: what is there is what a test has put there."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem


class Hub(MemoryFileSystem):
    protocol = ("hf",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("hf://"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a file at ORGANISATION/NAME/FILE."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where downloads are kept
    real = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", Hub, clobber=True)
    yield lambda path, data: Hub().pipe_file(f"hf://{path}", data)
    fsspec.register_implementation("hf", real, clobber=True)
