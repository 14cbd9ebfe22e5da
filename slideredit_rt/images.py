"""Pictures from disk and pictures that explain: opening, labelled strips and grids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import atomic_file

MAX_PIXELS = 64_000_000
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)


class PictureTooLarge(SliderEditError):
    """A picture with more pixels than are allowed."""


def open_image(
    source: str | Path | BinaryIO,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Read a picture as RGB, turned upright by its EXIF orientation, transparency laid over white; the first of an animation.

    Args:
        source: a path, or an open file.
        name: what an error calls the picture; None calls it by its path.
        max_pixels: checked in the file's header, before anything is decoded.
        formats: Pillow's names of those that are tried; None tries all that it knows.

    Raises:
        PictureTooLarge: more than `max_pixels`.
        SliderEditError: no such file, not a picture, or damaged.
    """
    name = f"image {str(source)!r}" if name is None else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(source, formats=formats)
        if image.width * image.height > max_pixels:
            raise PictureTooLarge(
                f"{name} has {image.width}×{image.height} pixels, more than the {max_pixels / 1e6:g} megapixels allowed; "
                "scale it down"
            )
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # Pillow would clip 16 bits at 255.
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError):
        raise SliderEditError(f"{name} does not exist; give a picture file") from None
    except Image.DecompressionBombError:
        raise PictureTooLarge(f"{name} has more than the {max_pixels / 1e6:g} megapixels allowed; scale it down") from None
    except SliderEditError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise anything
        reason = "it is no picture of a known format" if isinstance(error, UnidentifiedImageError) else error
        raise SliderEditError(f"{name} cannot be read ({reason}); give a PNG, JPEG or WebP file") from None


def picture_format(path: Path) -> str:
    """Pillow's name of the format that a file name asks for."""
    known = Image.registered_extensions()
    if path.suffix.lower() not in known:
        raise SliderEditError(f"cannot tell a picture format from {path.name!r}; end the name in .png, .jpg or .webp")
    return known[path.suffix.lower()]


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all; the format follows the file name."""
    wanted = picture_format(path)
    with atomic_file(path) as temporary:
        image.save(temporary, format=wanted)


def draw_grid(
    images: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str,
    cell: int = 160,
) -> Image.Image:
    """Lay pictures out in rows and columns with labels, each enlarged to about `cell` pixels without smoothing."""
    font = ImageFont.load_default(15)
    small = ImageFont.load_default(13)
    scale = max(1, round(cell / images[0][0].width))
    width, height = images[0][0].width * scale, images[0][0].height * scale
    gap, top, label = 8, 34, 22
    left = gap + max([0, *(int(small.getlength(text)) + gap for text in row_labels)])
    total = (left + len(images[0]) * (width + gap), top + label + len(images) * (height + gap))
    needed = int(font.getlength(title)) + 2 * gap
    sheet = Image.new("RGB", (max(total[0], needed), total[1]), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
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
