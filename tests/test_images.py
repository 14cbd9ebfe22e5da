"""Images of any mode and file, as an edit takes them; names of files that cannot hold the result."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.images import as_rgb, check_output, draw_grid, grid_size, open_image, read_images
from slideredit_rt.sliders import Slider

RED = "make the circle red"


def pixels(image: Image.Image) -> Any:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def lab(image: Image.Image) -> Image.Image:
    to, back = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, back, to, outputMode="LAB")
    assert isinstance(converted, Image.Image)
    return converted


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "P"])
def test_colours_stay_what_they_are(scene: Image.Image, mode: str) -> None:
    given = (
        lab(scene)
        if mode == "LAB"
        else scene.convert("RGBA").convert("RGBa")
        if mode == "RGBa"
        else scene.quantize(256)
        if mode == "P"
        else scene.convert(mode)
    )
    assert given.mode == mode
    assert np.abs(pixels(as_rgb(given)) - pixels(scene)).mean() < 3


@pytest.mark.parametrize("mode", ["L", "LA", "La", "I", "F", "I;16", "I;16B", "float 0 to 1"])
def test_greys_stay_what_they_are(scene: Image.Image, mode: str) -> None:
    grey = scene.convert("L")
    values = np.asarray(grey)
    deep = {
        "La": lambda: grey.convert("LA").convert("La"),
        "I;16": lambda: Image.fromarray(values.astype("<u2") * 257),
        "I;16B": lambda: Image.fromarray(values.astype(">u2") * 257),
        "float 0 to 1": lambda: Image.fromarray(values.astype(np.float32) / 255),
    }
    given = deep.get(mode, lambda: grey.convert(mode))()
    assert np.array_equal(pixels(as_rgb(given)), pixels(grey.convert("RGB")))


def test_32_bit_greys_may_hold_16_bits(scene: Image.Image) -> None:
    values = np.asarray(scene.convert("L"))
    assert np.array_equal(pixels(as_rgb(Image.fromarray(values.astype(np.int32) * 257)))[:, :, 0], values)


def test_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(as_rgb(image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), np.nan, np.float32), "values from nan to nan, but white is 1 or 255"),
        (np.full((2, 2), 300, np.float32), "values from 300 to 300, but white is 1 or 255 in mode F"),
        (np.full((2, 2), -0.5, np.float32), "values from -0.5"),
        (np.full((2, 2), 70_000, np.int32), "values from 70000 to 70000, but white is 255 or 65535 in mode I"),
    ],
)
def test_values_without_a_usual_range_are_refused(values: Any, message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        as_rgb(Image.fromarray(values))


def png(depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG file of 2×1 pixels."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    bodies = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(bodies))


def test_the_transparent_value_of_16_bits_becomes_white() -> None:
    grey = png(16, 0, b"\0" + struct.pack(">2H", 0x1234, 0x8000), (b"tRNS", struct.pack(">H", 0x1234)))
    assert pixels(open_image(grey)).tolist() == [[[255] * 3, [128] * 3]]
    key, other = (0x1234, 0x5678, 0x9ABC), (0xFFFF, 0, 0)
    colour = png(16, 2, b"\0" + struct.pack(">6H", *key, *other), (b"tRNS", struct.pack(">3H", *key)))
    assert pixels(open_image(colour)).tolist() == [[[255] * 3, [255, 0, 0]]]


def test_every_kind_of_image_gives_the_same_edit(st_editor: SliderEditor, scene: Image.Image, tmp_path: Path) -> None:
    def edit(image: Any) -> bytes:
        return st_editor.edit(image, [Slider(RED, 0.5)], steps=1).tobytes()

    scene.save(tmp_path / "scene.png")
    expected = edit(scene)
    sources: list[Any] = [scene.convert("RGBA"), tmp_path / "scene.png", str(tmp_path / "scene.png"), [scene], (scene,)]
    assert [edit(source) == expected for source in sources] == [True] * len(sources)
    grey = scene.convert("L")
    assert edit(grey) == edit(grey.convert("RGB")) == edit(grey.convert("F"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"of type numpy.ndarray is not supported; .*PIL.Image.fromarray"),
        (torch.zeros(3, 8, 8), "of type torch.Tensor"),
        (b"bytes", "of type bytes"),
        (None, "of type NoneType"),
        ([7], "of type int"),
        (Image.new("RGB", (0, 8)), "0×8 pixels"),
        ("nowhere.png", "image 'nowhere.png' does not exist"),
    ],
)
def test_whatever_else_is_refused(st_editor: SliderEditor, source: Any, message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        st_editor.prepare(source, [RED])


def test_a_file_that_turns_out_damaged_only_now_is_refused(scene: Image.Image) -> None:
    file = io.BytesIO()
    scene.save(file, "PNG")
    image = Image.open(io.BytesIO(file.getvalue()[:-200]))
    with pytest.raises(SliderEditError, match="cannot convert the image"):
        read_images(image)


def jpeg(image: Image.Image, exif: bytes) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    return io.BytesIO(file.getvalue())


def turned_exif(odd: bool) -> bytes:
    """Orientation 6, and with `odd` a rational with a denominator of 0, too large a numerator to be written again."""
    entries = [struct.pack("<HHII", 0x0112, 3, 1, 6)]
    if odd:
        entries.append(struct.pack("<HHII", 0x011A, 10, 1, 8 + 2 + 2 * 12 + 4))
    block = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return b"Exif\0\0" + block + (struct.pack("<ii", -5, 7) if odd else b"")


@pytest.mark.parametrize("odd", [False, True])
def test_a_file_is_turned_upright_whatever_else_its_exif_says(scene: Image.Image, odd: bool) -> None:
    tall = scene.resize((64, 48)).transpose(Image.Transpose.ROTATE_90)
    upright = open_image(jpeg(tall, turned_exif(odd)))
    assert upright.size == (64, 48)
    assert np.abs(pixels(upright) - pixels(scene.resize((64, 48)))).mean() < 3
    assert not upright.info


def test_an_opened_image_is_turned_and_one_made_from_it_is_not(scene: Image.Image) -> None:
    opened = Image.open(jpeg(scene.resize((48, 64)), turned_exif(odd=False)))
    assert as_rgb(opened).size == (64, 48)
    assert as_rgb(opened.copy()).size == (48, 64)
    assert as_rgb(as_rgb(opened)).size == (64, 48)


def test_texts_of_a_png_file_do_not_count(scene: Image.Image) -> None:
    texts, file = PngInfo(), io.BytesIO()
    texts.add_text("workflow", "x" * 3_000_000, zip=True)
    texts.add_itxt("prompt", "y" * 3_000_000, zip=True)
    scene.save(file, "PNG", pnginfo=texts)
    assert np.array_equal(pixels(open_image(io.BytesIO(file.getvalue()))), pixels(scene))


def test_a_png_file_is_turned_by_its_exif_block_or_its_texts(scene: Image.Image) -> None:
    sizes = []
    for options in ({"exif": turned_exif(odd=False)[6:]}, {"pnginfo": PngInfo()}):
        if "pnginfo" in options:
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')  # type: ignore[union-attr]
        file = io.BytesIO()
        scene.resize((48, 64)).save(file, "PNG", **options)  # type: ignore[arg-type]
        sizes.append(open_image(io.BytesIO(file.getvalue())).size)
    assert sizes == [(64, 48), (64, 48)]


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_png_file_cut_short_is_one_sentence(scene: Image.Image, cut: int) -> None:
    file = io.BytesIO()
    scene.save(file, "PNG")
    with pytest.raises(SliderEditError, match="cannot be read"):
        open_image(io.BytesIO(file.getvalue()[:cut]), name="it")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("a.psd", (64, 64), "Pillow does not write PSD files"),
        ("a.xbm", (64, 64), "cannot write mode RGB as XBM"),
        ("a.ico", (1024, 512), "it would become a ICO of 256×128 pixels"),
        ("a.webp", (16_384, 8), r"'a.webp' cannot hold an RGB image of 16384×8 pixels \(.*16383.*\); end the name in .png"),
        ("a.jpg", (65_501, 8), "cannot hold an RGB image of 65501×8 pixels"),
        ("a", (64, 64), "image format"),
    ],
)
def test_files_that_cannot_hold_the_result(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        check_output(Path(name), size)


def test_files_that_can(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp", "a.gif", "a.pdf"):
        check_output(tmp_path / name, (1024, 768))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("title", ["short", "a title that is longer than the two small cells below it are wide"])
def test_the_size_of_a_grid_is_known_beforehand(title: str) -> None:
    cells = [[Image.new("RGB", (64, 48))] * 2] * 3
    assert draw_grid(cells, ["0", "1"], ["a", "bb", "c"], title).size == grid_size((64, 48), 2, ["a", "bb", "c"], title)
