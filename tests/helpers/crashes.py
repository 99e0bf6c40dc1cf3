"""Images whose decoder ends its process, in processes that are started with `crashing`."""

import os

# By how the process ends: what such an image file ends with, after its own bytes.
CRASHES = {"SIGSEGV": b"crash", "exit code 3": b"leave", "SIGKILL": b"taken"}

PATCH = """
import os, signal, sys
import PIL.Image

real = PIL.Image.open


def crash(file, *arguments, **options):
    end = file.getvalue()[-5:]
    if end == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if end == b"leave":
        os._exit(3)
    if end == b"taken":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(file, *arguments, **options)


PIL.Image.open = crash
"""


def crashing(setenv, folder):
    """Let later processes crash at CRASHES: each imports `sitecustomize` before anything else."""
    (folder / "sitecustomize.py").write_text(PATCH)
    setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
