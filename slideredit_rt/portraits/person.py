"""Parameters of a person, and people drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

RANGES: dict[str, tuple[float, float]] = {
    # Place of the head: pixels, pixels, radians.
    "shift_x": (-3.0, 3.0),
    "shift_y": (-2.0, 2.0),
    "tilt": (-0.07, 0.07),
    # Face: half axes in pixels, narrowing towards the chin, squareness of the jaw.
    "face_width": (24.5, 28.5),
    "face_height": (30.0, 34.0),
    "narrowing": (0.06, 0.20),
    "jaw": (0.0, 0.55),
    "ear_size": (0.85, 1.15),
    "neck_width": (8.5, 12.5),
    "shoulder_width": (50.0, 60.0),
    # Features: pixels from the middle of the face, unless they are factors.
    "eye_x": (10.8, 12.8),
    "eye_y": (0.5, 3.5),
    "eye_width": (5.4, 6.6),
    "eye_slant": (-0.06, 0.12),
    "lashes": (0.0, 1.0),
    "brow_y": (9.0, 11.5),
    "brow_thickness": (1.0, 1.8),
    "nose_y": (11.0, 14.0),
    "nose_width": (4.0, 6.0),
    "mouth_y": (18.5, 21.5),
    "mouth_width": (8.0, 10.5),
    "lips": (1.6, 2.8),
    "neckline": (4.0, 12.0),
    "stripes": (0.0, 1.0),
    # Hair: height of the hairline above the middle of the face, its bend, its highest point, the volume
    # and the unevenness.
    "hairline": (13.0, 25.0),
    "hairline_bend": (0.010, 0.040),
    "parting": (-12.0, 12.0),
    "volume": (2.5, 7.0),
    "tousle": (0.0, 1.6),
    # Colours.
    "skin_red": (0.0, 1.0),
    "skin_green": (0.0, 1.0),
    "skin_blue": (0.0, 1.0),
    "iris_red": (0.0, 1.0),
    "iris_green": (0.0, 1.0),
    "iris_blue": (0.0, 1.0),
    # Everything below is changed by instructions. Amounts are 0 where the thing is absent and 1 where an instruction adds it.
    "hair_red": (0.0, 1.0),
    "hair_green": (0.0, 1.0),
    "hair_blue": (0.0, 1.0),
    "hair_length": (0.0, 1.7),
    "curl": (0.0, 1.8),
    "mouth_curve": (-5.0, 8.0),
    "mouth_open": (0.0, 11.0),
    "mouth_stretch": (-0.6, 0.5),
    "brow_raise": (-2.0, 6.0),
    "brow_slant": (-0.15, 0.6),
    "squint": (-0.5, 0.6),
    "eye_scale": (0.85, 1.75),
    "lids": (-0.1, 1.3),
    "age": (0.0, 2.0),
    "tan": (-0.3, 1.6),
    "blush": (0.0, 2.0),
    "beard": (0.0, 2.0),
    "glasses": (0.0, 2.0),
    "dark_lenses": (0.0, 1.25),
    "hat": (0.0, 2.0),
    "clothes_red": (0.0, 1.0),
    "clothes_green": (0.0, 1.0),
    "clothes_blue": (0.0, 1.0),
    "background_red": (0.0, 1.0),
    "background_green": (0.0, 1.0),
    "background_blue": (0.0, 1.0),
}
"""Parameters of a person with their smallest and largest value. People keep to a part of it, and edits are clamped to it."""

PARAMETERS: tuple[str, ...] = tuple(RANGES)
"""Names of the parameters, in the order of their columns."""

COLUMN: dict[str, int] = {name: index for index, name in enumerate(PARAMETERS)}

_SKINS = (
    (0.98, 0.84, 0.74),
    (0.96, 0.78, 0.65),
    (0.91, 0.71, 0.56),
    (0.83, 0.61, 0.45),
    (0.70, 0.48, 0.34),
    (0.55, 0.36, 0.25),
    (0.43, 0.28, 0.20),
)
_HAIRS = (
    (0.15, 0.13, 0.14),
    (0.26, 0.17, 0.12),
    (0.39, 0.24, 0.14),
    (0.54, 0.35, 0.19),
    (0.88, 0.70, 0.38),
    (0.66, 0.27, 0.13),
    (0.66, 0.66, 0.68),
)
# How often the hair colours and the eye colours occur with light, medium and dark skin.
_HAIR_WEIGHTS = ((1, 2, 3, 3, 3, 3, 1), (4, 4, 3, 1, 0.5, 0.5, 1), (6, 4, 1, 0.2, 0.1, 0.2, 1))
_IRIS_WEIGHTS = ((1, 1, 2, 2), (4, 3, 0.3, 1), (6, 3, 0, 0.2))
_IRISES = ((0.30, 0.18, 0.10), (0.42, 0.27, 0.13), (0.24, 0.44, 0.66), (0.30, 0.48, 0.32))
_CLOTHES = (
    (0.20, 0.38, 0.62),
    (0.93, 0.91, 0.87),
    (0.25, 0.26, 0.32),
    (0.89, 0.68, 0.26),
    (0.47, 0.33, 0.55),
    (0.23, 0.52, 0.53),
    (0.88, 0.52, 0.42),
)
_BACKGROUNDS = (
    (0.93, 0.78, 0.62),
    (0.70, 0.84, 0.74),
    (0.90, 0.72, 0.70),
    (0.76, 0.72, 0.88),
    (0.67, 0.80, 0.86),
    (0.94, 0.84, 0.58),
    (0.62, 0.76, 0.74),
)
_STYLE_COLUMNS = ("hairline", "hairline_bend", "parting", "volume", "tousle", "hair_length", "curl", "lashes")
_STYLES = (
    (22.5, 0.028, 2.0, 4.0, 1.0, 0.08, 0.0, 0.0),  # short
    (20.0, 0.024, 10.0, 6.0, 1.2, 0.10, 0.0, 0.0),  # short, swept to one side
    (21.0, 0.026, -8.0, 5.5, 0.0, 0.12, 0.8, 0.0),  # short curls
    (21.5, 0.026, -10.0, 5.0, 1.4, 0.16, 0.1, 0.0),  # tousled
    (14.5, 0.012, 2.0, 4.0, 0.0, 0.50, 0.0, 1.0),  # a bob with a fringe
    (22.0, 0.032, -9.0, 4.5, 0.0, 0.62, 0.0, 1.0),  # to the chin, parted at the side
    (23.0, 0.036, 0.0, 4.5, 0.0, 0.95, 0.0, 1.0),  # long, parted in the middle
    (21.0, 0.030, 6.0, 6.0, 0.0, 0.60, 0.9, 1.0),  # curls to the chin
    (21.0, 0.030, 8.0, 5.0, 0.3, 0.85, 0.3, 1.0),  # long waves
)

# Parameters that every person draws from an interval of their own within RANGES.
_DRAWN: dict[str, tuple[float, float]] = {
    "mouth_curve": (1.3, 2.7),
    "mouth_open": (0.0, 0.0),
    "mouth_stretch": (-0.08, 0.04),
    "brow_raise": (-0.4, 0.6),
    "brow_slant": (-0.08, 0.08),
    "squint": (-0.05, 0.05),
    "eye_scale": (0.95, 1.08),
    "lids": (0.0, 0.12),
    "age": (0.0, 0.12),
    "tan": (-0.1, 0.2),
    "blush": (0.0, 0.2),
    "beard": (0.0, 0.0),
    "glasses": (0.0, 0.0),
    "dark_lenses": (0.0, 0.0),
    "hat": (0.0, 0.0),
}
USUAL: dict[str, float] = {name: (low + high) / 2 for name, (low, high) in _DRAWN.items()}
"""Usual value of the parameters that people draw from an interval of their own."""

_JITTER = {
    "hairline": 1.2,
    "hairline_bend": 0.003,
    "parting": 2.0,
    "volume": 0.8,
    "tousle": 0.2,
    "hair_length": 0.05,
    "curl": 0.05,
}


def colour_columns(kind: str) -> slice:
    """Return the columns of the three channels of a colour, such as "skin"."""
    return slice(COLUMN[f"{kind}_red"], COLUMN[f"{kind}_red"] + 3)


def draw_people(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Draw people at random.

    Args:
        count: Number of people, N.
        generator: Random number generator. It draws on its own device.
        device: Device of the result.

    Returns:
        Parameters, float32 `[N, P]` in the order of `PARAMETERS`.
    """
    where = generator.device

    def uniform(width: int) -> Tensor:
        return torch.rand(count, width, generator=generator, device=where)

    def pick(rows: tuple[tuple[float, ...], ...], weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if weights is None:
            weights = torch.ones(count, len(rows), device=where)
        chosen = torch.multinomial(weights, 1, generator=generator)[:, 0]
        return chosen, torch.tensor(rows, device=where)[chosen]

    low, high = torch.tensor([_DRAWN.get(name, RANGES[name]) for name in PARAMETERS], device=where).unbind(1)
    people = low + (high - low) * uniform(len(PARAMETERS))
    skin, skins = pick(_SKINS)
    depth = (skin * 3).div(len(_SKINS), rounding_mode="floor")
    colours = {
        "skin": skins,
        "hair": pick(_HAIRS, torch.tensor(_HAIR_WEIGHTS, device=where)[depth])[1],
        "iris": pick(_IRISES, torch.tensor(_IRIS_WEIGHTS, device=where)[depth])[1],
        "clothes": pick(_CLOTHES)[1],
        "background": pick(_BACKGROUNDS)[1],
    }
    for kind, colour in colours.items():
        # A common factor changes the brightness, and a smaller one per channel the hue.
        people[:, colour_columns(kind)] = colour * (0.94 + 0.12 * uniform(1)) * (0.97 + 0.06 * uniform(3))
    style = [COLUMN[name] for name in _STYLE_COLUMNS]
    spread = torch.tensor([_JITTER.get(name, 0.0) for name in _STYLE_COLUMNS], device=where)
    people[:, style] = pick(_STYLES)[1] + spread * (2 * uniform(len(style)) - 1)
    # A third of the clothes has stripes, and a third of the people without lashes has a beard.
    people[:, COLUMN["stripes"]] = (uniform(1)[:, 0] < 1 / 3).float()
    bearded = (1 - people[:, COLUMN["lashes"]]) * (uniform(1)[:, 0] < 1 / 3)
    people[:, COLUMN["beard"]] = bearded * (0.8 + 0.3 * uniform(1)[:, 0])
    bottom, top = torch.tensor(list(RANGES.values()), device=where).unbind(1)
    return people.clamp(bottom, top).to(device)
