"""Pictures from disk and pictures that explain: opening, labelled strips and grids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import atomic_file

MAX_PIXELS = 64_000_000
_BACKGROUND, _INK = (255, 255, 255), (30, 30, 30)


def open_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB, turned upright by its EXIF orientation, transparency laid over white.

    Raises:
        SliderEditError: no such file, not a picture, damaged, or larger than 64 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise SliderEditError(
                f"image {str(path)!r} has {image.width}×{image.height} pixels, more than the {MAX_PIXELS // 1_000_000} "
                "megapixels allowed; scale it down"
            )
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except (FileNotFoundError, IsADirectoryError):
        raise SliderEditError(f"image {str(path)!r} does not exist; give a picture file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise SliderEditError(f"image {str(path)!r} cannot be read ({error}); give a PNG, JPEG or WebP file") from None


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
