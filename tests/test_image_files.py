"""Image files that are sent to the server: what decoding makes of them, and that damage is refused."""

from contextlib import suppress

import numpy as np
from http_server import as_file
from PIL import Image

from slideredit_rt import SliderEditError
from slideredit_rt.serving.image_files import decode_image_file


def decoded(data: bytes, max_pixels: int = 10**6) -> Image.Image:
    return decode_image_file(data, "the image", max_pixels=max_pixels, max_aspect=4)


def test_images_are_turned_upright_and_made_rgb(scene: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = decoded(as_file(scene.resize((64, 48)), exif=exif))
    assert turned.size == (48, 64)
    clear = decoded(as_file(Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    deep = decoded(as_file(Image.fromarray(np.full((4, 4), 32768, np.uint16))))
    assert deep.getpixel((0, 0)) == (128, 128, 128)
    moving = decoded(as_file(scene, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64))], lossless=True))
    assert moving.tobytes() == scene.tobytes()
    assert decoded(as_file(scene.convert("CMYK"), "JPEG")).mode == "RGB"


def test_damaged_files_are_refused_whatever_they_do_to_the_decoder(scene: Image.Image) -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = as_file(scene, kind)
        for _ in range(60):
            broken = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
            for place in rng.integers(0, max(1, len(broken)), 4):
                broken[place : place + 1] = bytes([rng.integers(256)])
            with suppress(SliderEditError):
                assert decoded(bytes(broken)).mode == "RGB"
