"""Drawing of people by antialiased signed distance functions, vectorised over the batch.

Every part is painted over the ones before it, with a coverage that follows from the distance to its outline. Small parts are
painted inside a fixed window. All operations run on the device of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slideredit_rt.portraits.person import COLUMN, colour_columns

SIZE = 128
"""Side of a rendered image in pixels."""

LAYERS: tuple[str, ...] = ("clothes", "hair", "skin", "eyes", "brows", "mouth", "beard", "glasses", "hat")
"""Parts whose visible coverage `layers` returns."""

_Window = tuple[slice, slice]
_BODY: _Window = (slice(84, SIZE), slice(0, SIZE))
_EARS: _Window = (slice(52, 94), slice(20, 108))
_FACE: _Window = (slice(24, 110), slice(26, 102))
_CHEEKS: _Window = (slice(56, 100), slice(30, 98))
_WRINKLES: _Window = (slice(32, 100), slice(34, 94))
_BEARD: _Window = (slice(60, 118), slice(24, 104))
_HAIR: _Window = (slice(6, SIZE), slice(8, 120))
_CROWN: _Window = (slice(8, 104), slice(10, 118))
_EYES: _Window = (slice(38, 94), slice(24, 104))
_NOSE: _Window = (slice(58, 96), slice(46, 82))
_MOUTH: _Window = (slice(72, 116), slice(36, 92))
_CHIN: _Window = (slice(56, SIZE), slice(20, 108))
_HAT: _Window = (slice(0, 66), slice(14, 114))

_EDGE = 1.4
"""Width of the soft edge of an outline in units of the drawing."""

_SCALE = 1.12
"""Pixels in a unit of the drawing."""
_MIDDLE = 1.5
"""Height of the middle of a face below the middle of the image, in pixels."""


_FIXED: dict[str, tuple[float, float, float]] = {
    # Factors of the colour of the skin.
    "tan": (0.80, 0.64, 0.50),
    "shadow on skin": (0.81, 0.72, 0.70),
    "wrinkle": (0.64, 0.50, 0.46),
    # Colours.
    "stripe": (0.96, 0.94, 0.90),
    "pink": (0.64, 0.10, 0.17),
    "rose": (0.68, 0.15, 0.20),
    "throat": (0.33, 0.09, 0.11),
    "teeth": (0.97, 0.95, 0.92),
    "eye white": (0.97, 0.96, 0.95),
    "pupil": (0.07, 0.06, 0.08),
    "spark": (1, 1, 1),
    "lashes": (0.17, 0.11, 0.10),
    "glass": (0.92, 0.96, 1.0),
    "dark glass": (0.13, 0.12, 0.17),
    "frame": (0.16, 0.14, 0.17),
    "wool": (0.85, 0.36, 0.26),
    "trim": (0.93, 0.84, 0.70),
    "shaded trim": (0.72, 0.58, 0.45),
}
_ROWS = {name: row for row, name in enumerate(_FIXED)}


def _cover(distance: Tensor) -> Tensor:
    """Return the coverage of a shape from the distance to its outline in pixels, which is negative inside."""
    return torch.rsub(distance, 0.5, alpha=1 / _EDGE).clamp_(0, 1)


def _ramp(value: Tensor, start: float, end: float) -> Tensor:
    """Return 0 where `value` is `start`, 1 where it is `end`, and clamp beyond."""
    return ((value - start) * (1 / (end - start))).clamp(0, 1)


def _ellipse(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    """Return about the distance to an ellipse around the origin with the half axes `width` and `height`."""
    return (torch.sqrt((x / width).square() + (y / height).square() + 1e-8) - 1) * ((width + height) / 2)


def _flat_ellipse(x: Tensor, y: Tensor, width: Tensor, height: Tensor) -> Tensor:
    """Return the distance to an ellipse to first order, which suits ellipses of very different half axes."""
    across, down = x / width, y / height
    radius = torch.sqrt(across.square() + down.square() + 1e-6)
    steep = torch.sqrt((across / width).square() + (down / height).square() + 1e-6)
    return radius * (radius - 1) / steep


def _box(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float, corner: float) -> Tensor:
    """Return the distance to a rounded box around the origin with the half sides `width` and `height`."""
    right, low = x.abs() - (width - corner), y.abs() - (height - corner)
    return torch.sqrt(right.clamp(min=0).square() + low.clamp(min=0).square() + 1e-8) - corner


def _crop(field: Tensor, outer: _Window, inner: _Window) -> Tensor:
    """Return the part of a field over `outer` that lies in `inner`."""
    top, left = (i.start - o.start for i, o in zip(inner, outer, strict=True))
    return field[:, top : top + inner[0].stop - inner[0].start, left : left + inner[1].stop - inner[1].start]


class _Image:
    """Canvas for colours, `[N, 3, SIZE, SIZE]`."""

    def __init__(self, people: Tensor) -> None:
        self.pixels = people.new_zeros(len(people), 3, SIZE, SIZE)

    def fill(self, colour: Tensor) -> None:
        """Paint the background."""
        self.pixels.copy_(colour)

    def paint(self, part: str, cover: Tensor, colour: Tensor, window: _Window) -> None:
        """Paint a part over everything that is there.

        Args:
            part: One of `LAYERS`.
            cover: Coverage in [0, 1], `[N, H, W]`.
            colour: Colour, which is broadcast to `[N, 3, H, W]`.
            window: Rows and columns of the image.
        """
        self.shade(cover, colour, window)

    def shade(self, cover: Tensor, colour: Tensor, window: _Window) -> None:
        """Paint light or shade, which belongs to the part below it. The arguments are those of `paint`."""
        self.pixels[:, :, window[0], window[1]].lerp_(colour, cover[:, None])


class _Coverage(_Image):
    """Canvas for the visible coverage of every part of `LAYERS`, `[N, L, SIZE, SIZE]`. The background is none of them."""

    def __init__(self, people: Tensor) -> None:
        self.pixels = people.new_zeros(len(people), len(LAYERS), SIZE, SIZE)
        self.parts = torch.eye(len(LAYERS), dtype=people.dtype, device=people.device)[:, :, None, None]

    def fill(self, colour: Tensor) -> None:
        """Leave the layers empty."""

    def paint(self, part: str, cover: Tensor, colour: Tensor, window: _Window) -> None:
        self.pixels[:, :, window[0], window[1]].lerp_(self.parts[LAYERS.index(part)], cover[:, None])

    def shade(self, cover: Tensor, colour: Tensor, window: _Window) -> None:
        """Leave the layers as they are."""


class _Painter:
    """Paints people, part by part from the back to the front.

    Coordinates are units of `_SCALE` pixels from the middle of the face: `x` and `y` along the axes of the image, `u` and `v`
    along the axes of the tilted head, to the right and downwards.
    """

    def __init__(self, people: Tensor, canvases: Sequence[_Image]) -> None:
        self.people, self.canvases = people, canvases
        # All of them at once, because every copy to a GPU waits for its queue.
        self.colours = torch.tensor(list(_FIXED.values()), dtype=people.dtype, device=people.device)[:, :, None, None]
        centre = torch.arange(SIZE, dtype=people.dtype, device=people.device) + (0.5 - SIZE / 2)
        self.x, self.y = centre[None, None, :] / _SCALE, (centre[None, :, None] - _MIDDLE) / _SCALE
        x, y = self.x - self.of("shift_x"), self.y - self.of("shift_y")
        cos, sin = torch.cos(self.of("tilt")), torch.sin(self.of("tilt"))
        self.u, self.v = x * cos + y * sin, y * cos - x * sin
        skin = self.colour("skin")
        tanned = skin * self.fixed("tan")
        self.skin = (skin + self.of("tan")[..., None] * (tanned - skin)).clamp(0.02, 0.98)
        self.shadow = self.skin * self.fixed("shadow on skin")
        self.light = self.skin + (1 - self.skin) * 0.45
        self.hair = self.colour("hair")
        self.hair_dark = self.hair * 0.68
        self.hair_light = self.hair + (1 - self.hair) * 0.26

    def of(self, name: str) -> Tensor:
        """Return a parameter, `[N, 1, 1]`."""
        return self.people[:, COLUMN[name], None, None]

    def colour(self, kind: str) -> Tensor:
        """Return a colour of the people, `[N, 3, 1, 1]`."""
        return self.people[:, colour_columns(kind), None, None]

    def fixed(self, name: str) -> Tensor:
        """Return a colour of `_FIXED`, `[3, 1, 1]`."""
        return self.colours[_ROWS[name]]

    def at(self, window: _Window) -> tuple[Tensor, Tensor]:
        """Return `u` and `v` inside a window."""
        return self.u[:, window[0], window[1]], self.v[:, window[0], window[1]]

    def paint(self, part: str, cover: Tensor, colour: Tensor, window: _Window) -> None:
        for canvas in self.canvases:
            canvas.paint(part, cover, colour, window)

    def shade(self, cover: Tensor, colour: Tensor, window: _Window) -> None:
        for canvas in self.canvases:
            canvas.shade(cover, colour, window)

    def paint_all(self) -> None:
        self.background()
        self.body()
        self.hair_behind()
        self.neck()
        self.ears()
        self.face()
        self.cheeks()
        self.wrinkles()
        self.beard()
        self.mouth()
        self.nose()
        self.eyes()
        self.brows()
        self.hair_in_front()
        self.glasses()
        self.hat()

    def background(self) -> None:
        away = torch.sqrt((self.x + 14).square() + (self.y + 18).square())
        light = (1.07 - away * 0.0024)[:, None]
        for canvas in self.canvases:
            canvas.fill(self.colour("background") * light)

    def body(self) -> None:
        x, y = self.x - self.of("shift_x") * 0.5, self.y[:, _BODY[0]]
        cloth = self.colour("clothes")
        part = x / self.of("shoulder_width")
        line = 37 + 22 * part.square().square()
        steep = torch.rsqrt(1 + (88 / self.of("shoulder_width") * part * part.square()).square())
        cover = _cover((line - y) * steep)
        self.paint("clothes", cover, cloth, _BODY)
        stripe = _cover((torch.sin(y * 0.82 + 0.03 * x.square() * 0.3) - 0.2) * -1.8) * cover
        self.shade(stripe * self.of("stripes") * 0.8, self.fixed("stripe"), _BODY)
        fold = cover * (_ramp(x.abs() + (y - 52) * 0.35, 24, 44) * 0.45)
        self.shade(fold, cloth * 0.72, _BODY)
        collar = _cover(_ellipse(x, y - 38.5, self.of("neck_width") + 6, self.of("neckline") + 4.0)) * cover
        self.shade(collar, cloth * 0.68, _BODY)

    def hair_behind(self) -> None:
        length, volume, curl = self.of("hair_length"), self.of("volume"), self.of("curl")
        (u, v), crown = self.at(_HAIR), self.of("face_height")
        self.wave = torch.sin(u * 0.52 + 1.2 * torch.sin(v * 0.31)) * torch.sin(v * 0.52 + 1.1 * torch.sin(u * 0.37))
        bump = 1.5 * curl.clamp(max=1.1)
        aside = self.of("face_width") + 1.0 + volume * 0.45 + 2.0 * _ramp(length, 0.1, 0.6) + curl * 2.5
        # The crown leans to the side of the parting, and its outline is uneven. Under a hat it is flat.
        lean = self.of("parting") * 0.4 * _ramp(v, -8, -40)
        uneven = self.of("tousle") * (1 - curl).clamp(min=0) * torch.sin(u * 0.46 + v * 0.22) * _ramp(v, -10, -26)
        pressed = (4 + 4 * curl) * self.of("hat").clamp(0, 1) * _ramp(v, -14, -20)
        self.cap = _ellipse(u - lean, v + 6, aside, crown - 4 + volume * 1.2 + curl * 3.0) - bump * self.wave - uneven + pressed
        bottom = 5 + 40 * length
        fall = v + 6
        half = (bottom + 6) / 2
        width = aside - 3.5 * _ramp(length, 0.5, 0.1) + fall * length * 0.06
        side = _box(u, fall - half, width, half, 11.0) - bump * self.wave
        # Long hair falls over the shoulders, on both sides of the chest.
        chest = (10 + (v - 36) * 0.30).clamp(min=0) * _ramp(v, 37, 42) - u.abs()
        side = torch.maximum(torch.maximum(side, -fall), chest)
        behind = torch.minimum(torch.maximum(self.cap, (v - bottom) * 0.7), side)
        cover = _cover(behind)
        self.paint("hair", cover, self.hair_dark, _HAIR)
        strands = (0.5 + 0.5 * torch.sin(u * 0.70 + v * 0.04)) * (1 - curl * 0.6).clamp(min=0) + curl * self.wave * 0.8
        self.shade(cover * _ramp(u.abs(), 20, 30) * strands.clamp(0, 1) * 0.8, self.hair, _HAIR)

    def neck(self) -> None:
        x, y = (self.x - self.of("shift_x") * 0.7)[:, :, _CHIN[1]], self.y[:, _CHIN[0]]
        width = self.of("neck_width")
        flare = width + ((y - 32) * 0.35).clamp(min=0)
        throat = torch.maximum(x.abs() - flare, y - 39)
        dip = _ellipse(x, y - 38.5, width + 3, self.of("neckline"))
        cover = _cover(torch.minimum(throat, dip)) * _ramp(y, -2, 10)
        self.paint("skin", cover, self.skin, _CHIN)
        u, v = self.at(_CHIN)
        below = _cover(_ellipse(u, v - 7, self.of("face_width") * 0.92, self.of("face_height")) * 0.5)
        self.shade(cover * below * 0.85, self.shadow, _CHIN)

    def ears(self) -> None:
        u, v = self.at(_EARS)
        size = self.of("ear_size")
        side, low = u.abs() - self.of("face_width") * 0.99, v - self.of("eye_y") - 3
        cover = _cover(_ellipse(side, low, 5.2 * size, 8.0 * size))
        self.paint("skin", cover, self.skin, _EARS)
        inner = _cover(_ellipse(side - 0.6, low - 0.3, 2.7 * size, 5.0 * size))
        self.shade(inner * 0.75, self.shadow, _EARS)

    def face(self) -> None:
        u, v = self.at(_FACE)
        width, height = self.of("face_width"), self.of("face_height")
        down = v / height
        across = u / (width * (1 - self.of("narrowing") * down))
        square = across.square()
        low = down.clamp(0, 1.1)
        shape = square + down.square() - (self.of("jaw") + 0.08 * self.of("age")) * square.clamp(max=1.2) * low.square()
        outline = (torch.sqrt(shape.clamp(min=1e-6)) - 1) * ((width + height) / 2)
        self.inside = _cover(outline)
        self.paint("skin", self.inside, self.skin, _FACE)
        # Light comes from the upper left.
        self.shade(self.inside * (_ramp(u * 0.9 + v * 0.25, 6, 32) * 0.55), self.shadow, _FACE)
        glow = torch.exp(-((u + 9).square() + (v + 14).square()) * (1 / 220))
        self.shade(self.inside * glow * 0.35, self.light, _FACE)

    def cheeks(self) -> None:
        u, v = self.at(_CHEEKS)
        warm = torch.exp(-((u.abs() - 15).square() * (1 / 46) + (v - 11.5).square() * (1 / 30)))
        amount = (0.10 + 0.46 * self.of("blush")).clamp(max=1)
        self.shade(_crop(self.inside, _FACE, _CHEEKS) * warm * amount, self.skin * 0.30 + self.fixed("pink"), _CHEEKS)

    def wrinkles(self) -> None:
        u, v = self.at(_WRINKLES)
        aside, age = u.abs(), self.of("age")
        bend = u.square() * 0.006
        brow = (v + 17.5 + bend) * (1 / 5.5)
        # Two lines on the forehead.
        lines = torch.exp(-(brow - torch.tanh(brow * 3)).square() * 26 - brow.square().square() * 0.1) * _ramp(aside, 15, 9)
        fold = (aside - 7 - (v - 13) * 0.55).abs()
        lines = torch.maximum(lines, torch.exp(-fold.square() * 0.55) * _ramp((v - 18).abs(), 7, 4))
        bag = (v - self.of("eye_y") - 8.0 + (aside - self.of("eye_x")).square() * 0.06).abs()
        lines = torch.maximum(lines, torch.exp(-bag.square() * 0.6) * _ramp((aside - self.of("eye_x")).abs(), 6.5, 4))
        self.shade(
            _crop(self.inside, _FACE, _WRINKLES) * lines * (age * 0.62).clamp(max=1),
            self.skin * self.fixed("wrinkle"),
            _WRINKLES,
        )

    def beard(self) -> None:
        u, v = self.at(_BEARD)
        beard = self.of("beard")
        grown = (beard - 0.3).clamp(min=0)
        jaw = _ellipse(u, v - 6, self.of("face_width") - 0.5 + grown, self.of("face_height") - 6 + 4.5 * grown)
        low = v - self.of("mouth_y")
        cheek = (-4.8 - u.square() * 0.013 + 2.0 * torch.exp(-u.square() * 0.25) - low) * 0.5
        bare = _cover(_ellipse(u, low - 1.0, self.of("mouth_width") * 0.86, 3.4) * 0.8)
        cover = _cover(torch.maximum(jaw, cheek)) * (1 - bare) * beard.clamp(max=1)
        colour = self.hair * 0.86 + 0.02
        self.paint("beard", cover, colour, _BEARD)
        hairs = (0.5 + 0.5 * torch.sin(u * 0.85 * (1 + 0.004 * v))) * _ramp(low, -3, 5)
        self.shade(cover * hairs * 0.6, self.hair_light, _BEARD)
        self.shade(cover * _ramp(u + v * 0.5, 8, 34) * 0.6, colour * 0.66, _BEARD)

    def mouth(self) -> None:
        u, v = self.at(_MOUTH)
        width = self.of("mouth_width") * (1 + self.of("mouth_stretch"))
        curve, opened = self.of("mouth_curve"), self.of("mouth_open")
        lips = self.of("lips") * (0.72 + 0.28 * self.of("lashes"))
        part = u / width
        # Height below the line of the mouth, which is a parabola.
        low = v - self.of("mouth_y") - 0.14 * opened + curve * (part.square().clamp(max=1.5) - 0.5)
        slope = torch.rsqrt(1 + (2 * curve * part / width).square())
        made_up = (0.28 + 0.27 * self.of("lashes") + 0.10 * self.of("blush"))[..., None]
        rose = self.skin * (1 - made_up) + made_up * self.fixed("rose")
        half = opened * 0.5 + 0.4
        outer = _flat_ellipse(u, low - 0.2 * lips, width + 0.6, half + lips) * slope
        self.paint("mouth", _cover(outer), rose, _MOUTH)
        hole = _flat_ellipse(u, low, width - 0.4, half) * slope
        gap = _cover(hole) * _ramp(opened, 0.2, 2.2)
        self.paint("mouth", gap, self.fixed("throat"), _MOUTH)
        teeth = gap * _cover(low + opened * 0.06 * (1 + curve * 0.1)) * _ramp(curve, 1.0, 3.5)
        self.paint("mouth", teeth, self.fixed("teeth"), _MOUTH)
        seam = torch.exp(-(low * slope).square() * 0.9) * _ramp(part.abs(), 1.05, 0.85) * _ramp(opened, 2.0, 0.2)
        self.shade(seam * 0.7, rose * 0.55, _MOUTH)

    def nose(self) -> None:
        u, v = self.at(_NOSE)
        tip, width = v - self.of("nose_y"), self.of("nose_width")
        bridge = torch.exp(-(u - 2.6).square() * 0.22) * _ramp(tip, -15, -5) * _ramp(tip, 1, -3)
        self.shade(bridge * 0.45, self.shadow, _NOSE)
        ball = _ellipse(u, tip, width, 3.4)
        self.shade(_cover(ball) * _ramp(tip, -2.5, 2.5) * 0.9, self.shadow * 0.92, _NOSE)
        self.shade(torch.exp(-((u + 0.8).square() + (tip + 1.4).square()) * 0.16) * 0.55, self.light, _NOSE)

    def eyes(self) -> None:
        u, v = self.at(_EYES)
        scale, lids = self.of("eye_scale"), self.of("lids")
        width, height = self.of("eye_width") * scale, 4.1 * scale * (1 - 0.35 * self.of("squint"))
        aside = u.abs() - self.of("eye_x")
        low = v - self.of("eye_y") + aside * self.of("eye_slant")
        part = (aside / width).square()
        arc = (1 - part).clamp(min=0)
        upper = -height * (1 - 1.75 * lids) * arc.clamp(min=1e-4).sqrt()
        lower = height * 0.85 * arc
        opening = torch.maximum(torch.maximum(upper - low, low - lower), aside.abs() - width) * 0.85
        cover = _cover(opening)
        self.paint("eyes", cover, self.fixed("eye white"), _EYES)
        look = u - torch.sign(u) * self.of("eye_x")
        ring = torch.sqrt(look.square() + (low + 0.4).square() + 1e-8)
        iris = cover * _cover(ring - 3.5 * scale)
        self.paint("eyes", iris, self.colour("iris"), _EYES)
        self.paint("eyes", cover * _cover(ring - 1.9 * scale), self.fixed("pupil"), _EYES)
        spark = torch.sqrt((look + 1.3 * scale).square() + (low + 1.8 * scale).square() + 1e-8) - 1.15 * scale
        self.paint("eyes", cover * _cover(spark), self.fixed("spark"), _EYES)
        lid = (low - upper).abs() - (0.75 + 0.55 * self.of("lashes")) * (0.8 + 0.2 * scale)
        end = _ramp(aside.abs() - width, 1.4, -0.6)
        self.paint("eyes", _cover(lid * 0.9) * end, self.fixed("lashes"), _EYES)

    def brows(self) -> None:
        u, v = self.at(_EYES)
        scale = self.of("eye_scale")
        aside = u.abs() - self.of("eye_x") - 0.5
        middle = self.of("eye_y") - self.of("brow_y") - 4 * (scale - 1) - self.of("brow_raise")
        curve = aside.square() * 0.035 + self.of("brow_slant") * (aside - 1) + 0.06 * aside
        thick = self.of("brow_thickness") * _ramp(aside, 11, -6).clamp(min=0.25)
        ends = _ramp(aside.abs(), 8.8, 7.2)
        grey = 0.55 * self.of("age").clamp(max=1.5)[..., None]
        colour = self.hair * 0.62 + grey * (0.45 - self.hair * 0.4)
        self.paint("brows", _cover((v - middle - curve).abs() - thick) * ends, colour, _EYES)

    def hair_in_front(self) -> None:
        u, v = self.at(_CROWN)
        cap, wave = _crop(self.cap, _HAIR, _CROWN), _crop(self.wave, _HAIR, _CROWN)
        curl, bend = self.of("curl"), self.of("hairline_bend")
        # The hairline is a hyperbola, which falls off on both sides of its highest point.
        part = (u - self.of("parting")) * bend * (1 / 0.55)
        rise = torch.sqrt(1 + part.square())
        line = (rise - 1) * (0.62 / bend) - self.of("hairline") + curl.clamp(max=1.2) * 1.8 * wave
        fringe = _ramp(bend, 0.022, 0.014)
        tips = self.of("tousle") * (1 - curl).clamp(min=0) + fringe
        line = line + tips * torch.sin(u * 0.62 + 1.0) * 0.8
        steep = torch.rsqrt(1 + (1.12 * part / rise).square())
        under = (v - line) * steep
        cast = torch.exp(-under.clamp(min=0) * 0.45) * _cover(cap + 2.5)
        self.shade(cast * 0.5, self.shadow * 0.9, _CROWN)
        cover = _cover(torch.maximum(cap, under))
        self.paint("hair", cover, self.hair, _CROWN)
        straight = (1 - curl).clamp(min=0)
        combed = (0.5 + 0.5 * torch.sin(under * (0.85 - 0.65 * fringe) + u * (0.12 + 0.58 * fringe))) * straight
        arc = torch.exp(-(cap + 8 + u * 0.08).square() * 0.05) * _ramp(u, 24, -10)
        self.shade(cover * arc * (0.25 + straight * 0.35 + combed * 0.4), self.hair_light, _CROWN)
        root = torch.exp(under.clamp(max=0) * 0.30) * 0.5
        curls = (wave * curl).clamp(-1, 1)
        dark = torch.maximum(root, combed * 0.35) + (-curls).clamp(min=0) * 0.6
        self.shade(cover * dark.clamp(max=1), self.hair_dark, _CROWN)
        self.shade(cover * (curls - 0.25).clamp(min=0) * 0.7, self.hair_light, _CROWN)

    def glasses(self) -> None:
        u, v = self.at(_EYES)
        amount, dark = self.of("glasses"), self.of("dark_lenses")
        seen = amount.clamp(0, 1)
        aside, low = u.abs() - self.of("eye_x") - 0.6, v - self.of("eye_y") - 0.6
        rim = _box(aside, low, 9.4, 8.6, 7.4)
        lens = _cover(rim) * seen
        self.paint("glasses", lens * 0.10, self.fixed("glass"), _EYES)
        self.paint("glasses", lens * 0.76 * dark, self.fixed("dark glass"), _EYES)
        glare = _cover((aside + low * 0.7 + 3.0).abs() - 1.6) * _cover(rim + 2.0) * seen * (0.16 + 0.14 * dark)
        self.paint("glasses", glare, self.fixed("spark"), _EYES)
        thick = 0.5 + 0.45 * amount
        frame = rim.abs() - thick
        bridge = torch.maximum((low + 2.5 + (u * 0.18).square()).abs() - thick, u.abs() - self.of("eye_x") + 8.5)
        temple = torch.maximum((low + 3.0).abs() - thick, torch.maximum(9.0 - aside, u.abs() - self.of("face_width") - 2))
        frame = torch.minimum(frame, torch.minimum(bridge, temple))
        self.paint("glasses", _cover(frame) * seen, self.fixed("frame"), _EYES)

    def hat(self) -> None:
        u, v = self.at(_HAT)
        hat = self.of("hat")
        seen, more = hat.clamp(0, 1), (hat - 1).clamp(min=0)
        width = self.of("face_width") + 5.5
        brim = v + self.of("face_height") * 0.52 + 5 * (1 - seen)
        wool = self.fixed("wool")
        pompom = _cover(torch.sqrt(u.square() + (brim + 29 + 7 * more).square() + 1e-8) - 5.5 - 1.5 * more) * seen
        self.paint("hat", pompom, self.fixed("trim"), _HAT)
        self.shade(pompom * _ramp(u + brim + 29, -2, 6) * 0.6, self.fixed("shaded trim"), _HAT)
        dome = torch.maximum(_ellipse(u, brim, width, 28 + 7 * more), brim)
        cover = _cover(dome) * seen
        self.paint("hat", cover, wool, _HAT)
        self.shade(cover * _ramp(u + brim * 0.4, -4, 22) * 0.7, wool * 0.74, _HAT)
        band = _box(u, brim - u.square() * 0.003, width + 1.2, 4.6 + more * 1.5, 3.0)
        cover = _cover(band) * seen
        self.paint("hat", cover, self.fixed("trim"), _HAT)
        self.shade(cover * (0.5 + 0.5 * torch.sin(u * 1.15)) * 0.5, self.fixed("shaded trim"), _HAT)


def _paint(people: Tensor, *canvases: _Image) -> None:
    with torch.no_grad():
        _Painter(people, canvases).paint_all()


def render(people: Tensor) -> Tensor:
    """Render people `[N, P]` as float32 `[N, 3, SIZE, SIZE]` in [0, 1]."""
    image = _Image(people)
    _paint(people, image)
    return image.pixels.clamp_(0, 1)


def render_with_layers(people: Tensor) -> tuple[Tensor, Tensor]:
    """Render people, and return the visible coverage of every part of `LAYERS` as well.

    Args:
        people: Parameters, `[N, P]`.

    Returns:
        The result of `render` and the coverages, float32 `[N, L, SIZE, SIZE]` in [0, 1], in little more than the time of one.
    """
    image, coverage = _Image(people), _Coverage(people)
    _paint(people, image, coverage)
    return image.pixels.clamp_(0, 1), coverage.pixels
