"""Image files in requests and responses: base64, data URLs, decoding and encoding."""

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

# Only these formats are tried: for some others Pillow starts external programs, which untrusted files must not reach.
_FORMATS = ("PNG", "JPEG", "WEBP")
_ELSEWHERE = re.compile(r"(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)
# The media type is ignored, since the file is recognised by its content.
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")


def image_bytes(text: str, param: str) -> bytes:
    """Decode a file from base64 (standard or URL-safe, padded or not), or from a base64 data URL.

    Raises:
        Fault: The text is another kind of URL, which is never fetched, or not base64.
    """
    text = text.strip()
    if _ELSEWHERE.match(text[:32]):
        raise Fault(
            400,
            f"{param} is the URL {text[:40]!r}, and this server does not fetch URLs; send the image as base64 or as "
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
            f"{param} is not base64; send the image as base64 or as data:image/png;base64,…",
            param=param,
            code="invalid_base64",
        ) from None


def decode_image_file(data: bytes, name: str, *, max_pixels: int, max_aspect: float) -> Image.Image:
    """Decode a PNG, JPEG or WebP file into an upright RGB image.

    Args:
        data: Contents of the file.
        name: Name of the image in error messages.
        max_pixels: Largest size, checked in the file's header before anything is decoded.
        max_aspect: Largest ratio of the longer to the shorter side. The rows of an edit grow with it.

    Raises:
        SliderEditError: The file is not such an image.
    """
    image = open_image(io.BytesIO(data), name=name, max_pixels=max_pixels, formats=_FORMATS)
    if max(image.size) > max_aspect * min(image.size):
        raise SliderEditError(
            f"{name} has {image.width}×{image.height} pixels, an aspect ratio above {max_aspect:g}:1; crop it"
        )
    return image


def encode_image_file(image: Image.Image, output_format: OutputFormat, compression: int) -> str:
    """Encode an image as a file in base64.

    Args:
        image: The image.
        output_format: Format of the file.
        compression: OpenAI's `output_compression`: quality of JPEG and WebP, in percent. WebP at 100 is lossless.
    """
    options: dict[str, Any] = {"png": {}, "jpeg": {"quality": compression}}.get(
        output_format, {"quality": compression, "lossless": compression == 100}
    )
    file = io.BytesIO()
    image.save(file, output_format, **options)
    return base64.b64encode(file.getvalue()).decode()
