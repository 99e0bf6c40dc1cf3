"""Encoded images, alone and in tar shards."""

import io
import tarfile

import numpy as np
from PIL import Image


def encoded(image, format="PNG", **options):
    """The bytes of a PIL image, or of an array of its pixels."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tar_of(members, mode="w", **options):
    """The bytes of a tar of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
