"""Images as requests carry them and as answers carry them."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any, Literal
from urllib.parse import unquote

from PIL import Image

from slideredit_rt.errors import SliderEditError
from slideredit_rt.images import open_image
from slideredit_rt.serving.faults import Fault

OutputFormat = Literal["png", "jpeg", "webp"]

# Pillow knows formats that call other programs; a stranger's file is not tried as one of those.
_FORMATS = ("PNG", "JPEG", "WEBP")
_ELSEWHERE = re.compile(r"(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)
# The media type is not trusted anyway, so any is taken, with any parameters.
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")


def image_bytes(text: str, param: str) -> bytes:
    """The file in base64 (standard or URL-safe, padded or not), or in a data URL of base64.

    Raises:
        Fault: another kind of URL, which is never fetched, or no base64.
    """
    text = text.strip()
    if _ELSEWHERE.match(text[:32]):
        raise Fault(
            400,
            f"{param} is the URL {text[:40]!r} and this server fetches none; send the image itself, in base64 or as "
            "data:image/png;base64,…",
            param=param,
            code="url_not_allowed",
        )
    data = unquote(text[found.end() :]) if (found := _DATA_URL.match(text)) else text
    data = "".join(data.split()).rstrip("=").translate(_URL_SAFE)
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Fault(
            400,
            f"{param} is no base64; send the image in base64 or as data:image/png;base64,…",
            param=param,
            code="invalid_base64",
        ) from None


def decode_image_file(data: bytes, name: str, *, max_pixels: int, max_aspect: float) -> Image.Image:
    """A PNG, JPEG or WebP file as an upright RGB image.

    Args:
        name: what errors call it.
        max_pixels: checked in the file's header, before anything is decoded.
        max_aspect: the longer side as a multiple of the shorter one. The rows of an edit grow with it.

    Raises:
        SliderEditError: not such an image.
    """
    image = open_image(io.BytesIO(data), name=name, max_pixels=max_pixels, formats=_FORMATS)
    if max(image.size) > max_aspect * min(image.size):
        raise SliderEditError(
            f"{name} has {image.width}×{image.height} pixels, one side more than {max_aspect:g} times the other; crop it"
        )
    return image


def encode_image_file(image: Image.Image, output_format: OutputFormat, compression: int) -> str:
    """Base64 of a file; `compression` is OpenAI's, the quality of JPEG and WebP in percent (WebP at 100 has no loss)."""
    options: dict[str, Any] = {"png": {}, "jpeg": {"quality": compression}}.get(
        output_format, {"quality": compression, "lossless": compression == 100}
    )
    file = io.BytesIO()
    image.save(file, output_format, **options)
    return base64.b64encode(file.getvalue()).decode()
