"""Images as an edit takes them, files that images are written to, and labelled strips and grids."""

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
_GAP, _TOP, _LABEL = 8, 34, 22  # pixels: between cells, above the column labels, of these

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
# The values that stand for white in grey images of more than 8 bits, from the narrowest range to the widest.
_WHITES: dict[str, tuple[float, ...]] = {"I;16": (65535,), "I": (255, 65535), "F": (1, 255)}

_PNG = b"\x89PNG\r\n\x1a\n"
# Pillow refuses a file whose text or colour profile unpacks to more than 1 MiB. Of these, an edit needs the orientation alone.
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
    """Read an image file as `as_rgb` converts it; the first image of an animation.

    Args:
        source: a path, or an open file.
        name: what an error calls the image; None calls it by its path.
        max_pixels: checked in the file's header, before anything is decoded.
        formats: Pillow's names of those that are tried; None tries all that it knows.

    Raises:
        ImageTooLarge: more than `max_pixels`.
        SliderEditError: no such file, not an image, or damaged.
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
        raise SliderEditError(f"{name} does not exist; give an image file") from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"{name} has more than the {max_pixels / 1e6:g} megapixels allowed; scale it down") from None
    except SliderEditError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise anything
        reason = "it is no image of a known format" if isinstance(error, UnidentifiedImageError) else error
        raise SliderEditError(f"{name} cannot be read ({reason}); give a PNG, JPEG or WebP file") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, without metadata.

    Transparency is laid over white. An image as `Image.open` returned it is turned upright by its EXIF orientation; one made
    from it since is taken as it is. Grey values of more than 8 bits are scaled from the narrowest usual range that holds
    them: 0 to 65535 for 16 bits, 0 to 255 or 0 to 65535 for 32 bits, 0 to 1 or 0 to 255 for floats.

    Raises:
        SliderEditError: no pixels, values outside these ranges or not finite, or a mode or file that Pillow cannot read.
    """
    try:
        return _convert(image, "the image")
    except SliderEditError:
        raise
    except Exception as error:  # a file is decoded only now
        raise SliderEditError(f"the image cannot be read as RGB from the mode {image.mode} ({error}); convert it") from None


def read_images(source: ImageSource | Sequence[ImageSource]) -> list[Image.Image]:
    """The images of an edit as `as_rgb` converts them: one or several, each in memory or at a path.

    Raises:
        SliderEditError: anything else, or an image that cannot be read.
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
        f"an image was given as {kind}; give a PIL image or the path of a file (PIL.Image.fromarray makes one of an array)"
    )


def _convert(image: Image.Image, name: str) -> Image.Image:
    """See `as_rgb`; may raise what Pillow does."""
    if not image.width or not image.height:
        raise SliderEditError(f"{name} has {image.width}×{image.height} pixels; give one with at least 1×1")
    image.load()
    turn = _turn(image)
    if image.mode.partition(";")[0] in ("I", "F"):
        image = _as_grey(image, name)
    elif image.mode == "LAB":
        profiles = [ImageCms.ImageCmsProfile(p) for p in (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))]
        image = ImageCms.ImageCmsTransform(profiles[0], profiles[1], "LAB", "RGB").apply(image)
    elif image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    if image.has_transparency_data:
        rgba = _with_8_bit_key(image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = image.convert("RGB")
    rgb.info = {}  # says things about the file that are no longer true
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an opened file upright; None where nothing does, or where its EXIF block is damaged."""
    if isinstance(image, ImageFile.ImageFile):
        with suppress(Exception):
            return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _as_grey(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bits as 8 bits; the value that a file names as transparent turns white."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    whites = _WHITES["I;16" if image.mode.startswith("I;16") else image.mode]
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        usual = " or ".join(f"{w:g}" for w in whites)
        raise SliderEditError(
            f"{name} has values from {low:g} to {high:g} in the mode {image.mode}, where {usual} is white; scale them to 0 to "
            "255 and convert it to the mode L"
        )
    grey = np.rint(values.astype(np.float32) * (255 / white)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _with_8_bit_key(image: Image.Image) -> Image.Image:
    """The image with its transparent colour in 8 bits: Pillow leaves that in 16 bits where it reads the pixels in 8."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _without_extras(file: BinaryIO) -> BinaryIO:
    """A PNG file without the texts and the colour profile that an edit does not need; any other file as it is."""
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
    """Pillow's name of the format that a file name asks for, one that it can write."""
    known = Image.registered_extensions()
    if path.suffix.lower() not in known:
        raise SliderEditError(f"cannot tell an image format from {path.name!r}; end the name in .png, .jpg or .webp")
    return known[path.suffix.lower()]


@lru_cache(maxsize=256)
def cannot_hold(wanted: str, size: tuple[int, int]) -> str | None:
    """Why files of a format (Pillow's name) cannot hold an RGB image of a size; None where they can."""
    written: tuple[str | None, tuple[int, int]] = wanted, size
    file = io.BytesIO()
    try:
        # Only an attempt tells: limits of size and mode are nowhere written down.
        Image.new("RGB", size).save(file, wanted)
        with suppress(OSError), Image.open(file) as image:  # some formats are written and not read
            written = image.format, image.size
        if written != (wanted, size):
            raise ValueError(f"it would become a {written[0]} of {written[1][0]}×{written[1][1]} pixels")
    except Exception as error:  # encoders raise anything
        return f"Pillow does not write {wanted} files" if wanted not in Image.SAVE else str(error)
    return None


def check_output(path: Path, size: tuple[int, int] = (64, 64)) -> None:
    """Refuse a file name whose format does not hold an RGB image of a size, before there is one.

    Raises:
        SliderEditError: a format that is unknown, that Pillow does not write, or that it writes in another format or size.
    """
    if (reason := cannot_hold(image_format(path), size)) is not None:
        raise SliderEditError(
            f"{path.name!r} cannot hold an RGB image of {size[0]}×{size[1]} pixels ({reason}); end the name in .png"
        )


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all; the format follows the file name."""
    wanted = image_format(path)
    with atomic_file(path) as temporary:
        image.save(temporary, format=wanted)


def grid_size(size: tuple[int, int], columns: int, row_labels: Sequence[str], title: str, cell: int = 160) -> tuple[int, int]:
    """Width and height of what `draw_grid` makes of images of one size, with a row for each label."""
    width, height = _enlarged(size, cell)
    total = _left(row_labels) + columns * (width + _GAP), _TOP + _LABEL + len(row_labels) * (height + _GAP)
    return max(total[0], int(_fonts()[0].getlength(title)) + 2 * _GAP), total[1]


def _fonts() -> tuple[Any, Any]:
    """Of the title and of the labels."""
    return ImageFont.load_default(15), ImageFont.load_default(13)


def _enlarged(size: tuple[int, int], cell: int) -> tuple[int, int]:
    scale = max(1, round(cell / size[0]))
    return size[0] * scale, size[1] * scale


def _left(row_labels: Sequence[str]) -> int:
    """Where the first column begins."""
    small = _fonts()[1]
    return _GAP + max([0, *(int(small.getlength(text)) + _GAP for text in row_labels)])


def draw_grid(
    images: Sequence[Sequence[Image.Image]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
    title: str,
    cell: int = 160,
) -> Image.Image:
    """Lay images out in rows and columns with labels, each enlarged to about `cell` pixels without smoothing."""
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
