"""Reading and conversion of images, writing of image files, and labelled grids."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFile, ImageFont, UnidentifiedImageError

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import atomic_file

MAX_PIXELS = 64_000_000
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)
_GAP, _TOP, _LABEL = 8, 34, 22  # pixels: gap between cells, height above the column labels, height of the labels

ImageSource = Image.Image | str | os.PathLike[str]
"""An image in memory, or the path of one."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Possible values of white in grey images of more than 8 bits, in ascending order.
_WHITES: dict[str, tuple[float, ...]] = {"I;16": (65535,), "I": (255, 65535), "F": (1, 255)}

_PNG = b"\x89PNG\r\n\x1a\n"
# Pillow refuses a file whose text or colour profile unpacks to more than 1 MiB. Edits only need the orientation.
_PNG_EXTRAS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")


class ImageTooLarge(SliderEditError):
    """An image with more pixels than are allowed."""


def open_image(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Read an image file, or the first image of an animation, and convert it with `as_rgb`.

    Args:
        source: Path or open file.
        name: Name of the image in error messages; None uses its path.
        max_pixels: Largest accepted number of pixels, checked in the file's header before anything is decoded.
        formats: Pillow's names of accepted formats; None accepts all that it knows.

    Raises:
        ImageTooLarge: The image has more than `max_pixels` pixels.
        SliderEditError: The file does not exist, is damaged, or is not an image.
    """
    name = f"image {str(source)!r}" if name is None else name
    try:
        with Path(source).open("rb") if isinstance(source, (str, os.PathLike)) else nullcontext(source) as file:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image: Image.Image = Image.open(_without_extras(file), formats=formats)
            if image.width * image.height > max_pixels:
                raise ImageTooLarge(
                    f"{name} has {image.width}×{image.height} pixels, more than the {max_pixels / 1e6:g} megapixels allowed; "
                    "scale it down"
                )
            return _convert(image, name)
    except (FileNotFoundError, IsADirectoryError):
        raise SliderEditError(f"{name} does not exist; pass an image file") from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"{name} has more than the {max_pixels / 1e6:g} megapixels allowed; scale it down") from None
    except SliderEditError:
        raise
    except Exception as error:  # Pillow's decoders raise various exceptions for damaged files
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise SliderEditError(f"{name} cannot be read ({reason}); use a PNG, JPEG or WebP file") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, without metadata.

    Transparent images are composited over white. An image returned by `Image.open` is turned upright by its EXIF orientation;
    images derived from it are not turned. Grey values of more than 8 bits are scaled from the narrowest usual range that
    contains them: 0 to 65535 for 16 bits, 0 to 255 or 0 to 65535 for 32 bits, 0 to 1 or 0 to 255 for floats.

    Raises:
        SliderEditError: The image has no pixels, values outside these ranges, or a mode or file that Pillow cannot read.
    """
    try:
        return _convert(image, "the image")
    except SliderEditError:
        raise
    except Exception as error:  # the file is only decoded here
        raise SliderEditError(
            f"cannot convert the image from mode {image.mode} to RGB ({error}); convert it with another program"
        ) from None


def read_images(source: ImageSource | Sequence[ImageSource]) -> list[Image.Image]:
    """Read the images of an edit and convert them with `as_rgb`.

    Args:
        source: One image or several, each in memory or as a path.

    Raises:
        SliderEditError: An argument is neither an image nor a path, or an image cannot be read.
    """
    several = source if isinstance(source, Sequence) and not isinstance(source, (str, bytes)) else [source]
    return [_read(image) for image in several]


def _read(source: Any) -> Image.Image:
    if isinstance(source, (str, os.PathLike)):
        return open_image(source)
    if isinstance(source, Image.Image):
        return as_rgb(source)
    kind = f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
    raise SliderEditError(
        f"an image of type {kind} is not supported; pass a PIL image or a path (use PIL.Image.fromarray for an array)"
    )


def _convert(image: Image.Image, name: str) -> Image.Image:
    """Convert an image as `as_rgb` does. Any exception of Pillow may be raised."""
    if not image.width or not image.height:
        raise SliderEditError(f"{name} has {image.width}×{image.height} pixels; pass one with at least 1×1")
    image.load()
    turn = _turn(image)
    if image.mode.partition(";")[0] in ("I", "F"):
        image = _as_grey(image, name)
    elif image.mode == "LAB":
        profiles = [ImageCms.ImageCmsProfile(p) for p in (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))]
        image = ImageCms.ImageCmsTransform(profiles[0], profiles[1], "LAB", "RGB").apply(image)
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow cannot convert La to another mode directly
    if image.has_transparency_data:
        rgba = _with_8_bit_key(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = image.convert("RGB")
    rgb.info = {}  # it describes the file, not the converted image
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns an opened file upright; None if it is upright or its EXIF block is damaged."""
    if isinstance(image, ImageFile.ImageFile):
        with suppress(Exception):
            return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _as_grey(image: Image.Image, name: str) -> Image.Image:
    """Convert grey of more than 8 bits to 8 bits. A value that the file marks as transparent becomes white."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    whites = _WHITES["I;16" if image.mode.startswith("I;16") else image.mode]
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        usual = " or ".join(f"{w:g}" for w in whites)
        raise SliderEditError(
            f"{name} has values from {low:g} to {high:g}, but white is {usual} in mode {image.mode}; scale them to 0 to 255 "
            "and convert the image to mode L"
        )
    grey = np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _with_8_bit_key(image: Image.Image) -> Image.Image:
    """Convert a transparent colour to 8 bits. Pillow keeps it in 16 bits even if it reads the pixels in 8 bits."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _without_extras(file: BinaryIO) -> BinaryIO:
    """Remove texts and colour profile, which edits do not need, from a PNG file; return any other file unchanged."""
    file.seek(0)
    if file.read(len(_PNG)) != _PNG:
        file.seek(0)
        return file
    content, kept, place = file.read(), io.BytesIO(), 0
    kept.write(_PNG)
    while place < len(content):
        # Length, kind, body, checksum.
        end = place + 12 + int.from_bytes(content[place : place + 4])
        if content[place + 4 : place + 8] not in _PNG_EXTRAS or content.startswith(_PNG_ORIENTATION, place + 8):
            kept.write(content[place:end])
        place = end
    kept.seek(0)
    return kept


def image_format(path: Path) -> str:
    """Return Pillow's name of the format of a file name.

    Raises:
        SliderEditError: The suffix is not known.
    """
    known = Image.registered_extensions()
    if path.suffix.lower() not in known:
        raise SliderEditError(f"cannot tell an image format from {path.name!r}; end the name in .png, .jpg or .webp")
    return known[path.suffix.lower()]


@lru_cache(maxsize=256)
def cannot_hold(wanted: str, size: tuple[int, int]) -> str | None:
    """Return the reason why files of a format (Pillow's name) cannot hold an RGB image of a size; None if they can."""
    written: tuple[str | None, tuple[int, int]] = wanted, size
    file = io.BytesIO()
    try:
        # Try it, because the limits of size and mode are not documented.
        Image.new("RGB", size).save(file, wanted)
        with suppress(OSError), Image.open(file) as image:  # Pillow writes some formats that it cannot read
            written = image.format, image.size
        if written != (wanted, size):
            raise ValueError(f"it would become a {written[0]} of {written[1][0]}×{written[1][1]} pixels")
    except Exception as error:  # encoders raise various exceptions
        return f"Pillow does not write {wanted} files" if wanted not in Image.SAVE else str(error)
    return None


def check_output(path: Path, size: tuple[int, int] = (64, 64)) -> None:
    """Check, before there is an image, that the format of a file name can hold an RGB image of a size.

    Args:
        path: File to write.
        size: Width and height, in pixels.

    Raises:
        SliderEditError: The format is unknown, Pillow does not write it, or it cannot hold the image.
    """
    if (reason := cannot_hold(image_format(path), size)) is not None:
        raise SliderEditError(
            f"{path.name!r} cannot hold an RGB image of {size[0]}×{size[1]} pixels ({reason}); end the name in .png"
        )


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically, in the format of the file name.

    Raises:
        SliderEditError: The suffix is not known, or the file cannot be written.
    """
    wanted = image_format(path)
    with atomic_file(path) as temporary:
        image.save(temporary, format=wanted)


def grid_size(size: tuple[int, int], columns: int, row_labels: Sequence[str], title: str, cell: int = 160) -> tuple[int, int]:
    """Return the width and height of a grid from `draw_grid`, in pixels.

    Args:
        size: Width and height of the images.
        columns: Number of columns.
        row_labels: Label of each row.
        title: Title of the grid.
        cell: Approximate width of a cell, in pixels.
    """
    width, height = _enlarged(size, cell)
    total = _left(row_labels) + columns * (width + _GAP), _TOP + _LABEL + len(row_labels) * (height + _GAP)
    return max(total[0], int(_fonts()[0].getlength(title)) + 2 * _GAP), total[1]


def _fonts() -> tuple[Any, Any]:
    """Return the fonts of the title and the labels."""
    return ImageFont.load_default(15), ImageFont.load_default(13)


def _enlarged(size: tuple[int, int], cell: int) -> tuple[int, int]:
    scale = max(1, round(cell / size[0]))
    return size[0] * scale, size[1] * scale


def _left(row_labels: Sequence[str]) -> int:
    """Return the x coordinate of the first column."""
    small = _fonts()[1]
    return _GAP + max([0, *(int(small.getlength(text)) + _GAP for text in row_labels)])


def draw_grid(
    images: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str,
    cell: int = 160,
) -> Image.Image:
    """Draw images in rows and columns with labels.

    Args:
        images: Rows of images, all of one size.
        column_labels: Label of each column.
        row_labels: Label of each row.
        title: Title of the grid.
        cell: Approximate width of a cell, in pixels; images are enlarged by a whole factor without smoothing.
    """
    sheet = Image.new("RGB", grid_size(images[0][0].size, len(images[0]), row_labels, title, cell), _BACKGROUND)
    draw, font, small = ImageDraw.Draw(sheet), *_fonts()
    (width, height), left = _enlarged(images[0][0].size, cell), _left(row_labels)
    gap, top, label = _GAP, _TOP, _LABEL
    draw.text((gap, 8), title, _INK, font)
    for column, text in enumerate(column_labels):
        x = left + column * (width + gap) + (width - small.getlength(text)) / 2
        draw.text((x, top), text, _INK, small)
    for row, (cells, text) in enumerate(zip(images, row_labels, strict=True)):
        y = top + label + row * (height + gap)
        draw.text((gap, y + height / 2 - 8), text, _INK, small)
        for column, image in enumerate(cells):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * (width + gap), y))
    return sheet
