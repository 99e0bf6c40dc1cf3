"""Image bytes to PIL image; what cannot be decoded raises `BadImage` and is quarantined."""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image, UnidentifiedImageError

from dpt_ray.data.listing import FORMATS

Mode = Literal["RGB", "L"]
DEEP = "have more than 8 bits a value, of which all above 255 are read as white; convert them to 8 bits"


class BadImage(ValueError):  # noqa: N818 - a finding about one image, not a fault of the program
    """One image that cannot be used; `reason` is short, stable text for the quarantine table."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes, mode: Mode = "RGB") -> Image.Image:
    """Return the image as PIL's `convert(mode)` gives it, first frame, EXIF rotation not applied.

    Alpha is dropped (not blended), 16-bit values saturate at 255, CMYK and palettes are converted, as
    by the `Image.open(...).convert("RGB")` of the published features.

    Raises `BadImage` for bytes that are empty, truncated, damaged, of no format in `FORMATS`, or of
    more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (a decompression bomb).
    """
    if not data:
        raise BadImage("empty: zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            check_pixels(*image.size)  # from the header, before any pixel is decoded
            image.load()
            return image if image.mode == mode else image.convert(mode)  # convert always copies
    except (BadImage, MemoryError):  # running out of memory is not the image's fault
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # damaged bytes make PIL's plugins raise nearly anything
        reason = str(error) or type(error).__name__
        raise BadImage(f"cannot be decoded: {reason}") from error


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has more than 8 bits a value: `decode` reads all above 255 as white."""
    return image.mode.startswith(("I", "F"))


def check_pixels(width: int, height: int) -> None:
    """Raise `BadImage` where width x height exceeds `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise BadImage(f"too large: {width} x {height} is more than {limit} pixels")
