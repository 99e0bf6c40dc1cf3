"""The page on which a person labels images: one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

PICTURE_PIXELS = 384  # the longer side of a picture at most
SMALL = 96  # up to this side pictures are lossless, and magnified without smoothing


@dataclass(frozen=True)
class LabelPage:
    """The content of the page.

    `images` are (id, picture) in the order in which they are shown. `given` are the (id, class) that exist
    already; the saved list begins with them. With `open_classes` the person may name new classes, else
    `classes` are all that there are.
    """

    title: str
    images: Sequence[tuple[str, Image.Image]]
    classes: Sequence[str] = ()
    open_classes: bool = False
    given: Sequence[tuple[str, str]] = ()


def render_label_page(content: LabelPage) -> str:
    """Return the page; it saves `labels.csv` with the columns id,label."""
    folder = Path(__file__).parent
    script = (folder / "label.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("label.html").render(
        title=content.title,
        page=_page(content),
        script=script,
        script_hash=f"sha256-{digest}",  # the page runs this script and no other
    )


def _page(content: LabelPage) -> dict[str, Any]:
    """Return what label.js reads."""
    classes, given = list(content.classes), [list(row) for row in content.given]
    # What was typed is kept for the same images, classes and given labels only.
    same = json.dumps([[identifier for identifier, _ in content.images], classes, given])
    return {
        "key": f"dpt-labels-{hashlib.sha256(same.encode()).hexdigest()[:32]}",
        "classes": classes,
        "open": content.open_classes,
        "given": given,
        "images": [
            {"id": identifier, "src": _data_uri(picture), "small": max(picture.size) <= SMALL}
            for identifier, picture in content.images
        ],
    }


def _data_uri(picture: Image.Image) -> str:
    """Return an RGB or L image as a data URI, scaled down to `PICTURE_PIXELS`."""
    buffer = io.BytesIO()
    if max(picture.size) <= SMALL:
        kind = "png"
        picture.save(buffer, "PNG")
    else:
        kind = "jpeg"
        scaled = picture.copy()
        scaled.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
        scaled.save(buffer, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
