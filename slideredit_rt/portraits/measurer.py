"""Exact reading of edited portraits.

The correct result of an instruction is known for every strength, so the response of an image is the strength whose drawing is
nearest to it, and the identity drift is its distance to the drawing where no instruction changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from slideredit_rt.portraits.drawing import SIZE, render
from slideredit_rt.portraits.world import INSTRUCTIONS, Example, edit

_FIRST, _LAST, _STEP = -0.25, 2.0, 1 / 16
_SEEN_UP_TO = 1.5
_ROUNDED = 8
"""Strengths of other instructions are rounded to this part of 1, so that images can share drawings."""
_VISIBLE = 5 / 255
"""Smallest difference of a channel that counts as a visible change of a pixel."""


@dataclass(frozen=True)
class _Path:
    """Drawings of an instruction at every strength that is looked for.

    Attributes:
        region: Pixels that visibly change between strengths 0 and 1.5, bool `[SIZE, SIZE]`.
        drawings: These R pixels at each of the K strengths of `_strengths`, `[K, 3, R]`.
    """

    region: Tensor
    drawings: Tensor

    def nearest(self, images: Tensor) -> Tensor:
        """Return the strengths at which the path is nearest to images `[M, 3, SIZE, SIZE]`, `[M]`."""
        pixels, path, steps = images[:, :, self.region].flatten(1), self.drawings.flatten(1), _strengths()
        squared = torch.cdist(pixels.to(path), path, compute_mode="donot_use_mm_for_euclid_dist")
        squared = squared.double().square()  # in single precision rounding would decide between equal distances
        length = (path[1:] - path[:-1]).square().sum(dim=1).double()
        near, far = squared[:, :-1], squared[:, 1:]
        share = ((near - far + length) / (2 * length.clamp(min=1e-12))).clamp(0, 1)
        apart = near + share * (far - near) - share * (1 - share) * length
        strength = steps[:-1] + share * _STEP
        # Where the path stands still, all strengths are equally near, and the one closest to 0 counts.
        best = (apart + 1e-9 * strength.abs()).argmin(dim=1, keepdim=True)
        return strength.gather(1, best)[:, 0].float()


def _strengths() -> Tensor:
    return torch.arange(_FIRST, _LAST + _STEP / 2, _STEP)


@lru_cache(maxsize=64)
def _path(example: Example, index: int, given: tuple[float, ...]) -> _Path:
    """Return the path of an instruction. Drawing it takes longer than reading an image, and a case is read for many images.

    Args:
        example: Person and instructions. Paths are kept for this object, not for an equal one.
        index: Index of the instruction in the example.
        given: Strengths of the other instructions, one per instruction of the world.
    """
    steps = _strengths()
    strengths = torch.tensor([given]).repeat(len(steps), 1)
    strengths[:, INSTRUCTIONS.index(example.instructions[index])] = steps
    drawings = render(edit(example.people.expand(len(strengths), -1), strengths))
    passed = drawings[(steps >= 0) & (steps <= _SEEN_UP_TO)]
    region = ((passed - drawings[steps == 0]).abs() > _VISIBLE).any(dim=0).any(dim=0)
    return _Path(region, drawings[:, :, region])


class Reader:
    """Reads edited images of one example.

    Args:
        example: Person and instructions.
        strengths: Strengths of the other instructions while one of them is read, `[1, I]`. The default is the complete edit.
    """

    def __init__(self, example: Example, strengths: Tensor | None = None) -> None:
        self.example = example
        self.given = example.strengths if strengths is None else strengths
        given = tuple(self.given[0].tolist())
        self.paths = [_path(example, index, given) for index in range(len(example.instructions))]
        self.regions = [path.region for path in self.paths]

    @cached_property
    def untouched(self) -> Tensor:
        """Pixels that no instruction of the example changes, bool `[SIZE, SIZE]`."""
        return ~torch.stack(self.regions).any(dim=0)

    def responses(self, images: Tensor) -> Tensor:
        """Return how far each instruction was carried out, float32 `[M, n]`.

        It is 0 for the source, 1 for the exact edit and above 1 beyond it. Between two drawings of the path it is read from the
        point of their blend that is nearest to the image.

        Args:
            images: Images, float `[M, 3, SIZE, SIZE]` in [0, 1].

        Raises:
            ValueError: The shape of `images` is wrong.
        """
        _check(images)
        return torch.stack([path.nearest(images) for path in self.paths], dim=1)

    def drift(self, images: Tensor) -> Tensor | None:
        """Return the root mean squared distance to the exact drawing outside of all edited regions, float32 `[M]`.

        It is in units of [0, 1] pixel values, and None if the instructions change every pixel.

        Args:
            images: Images, float `[M, 3, SIZE, SIZE]` in [0, 1].

        Raises:
            ValueError: The shape of `images` is wrong.
        """
        _check(images)
        if not self.untouched.any():
            return None
        exact = render(edit(self.example.people, self.given))[:, :, self.untouched]
        return (images[:, :, self.untouched] - exact).square().flatten(1).mean(dim=1).sqrt()


def read_jointly(example: Example, images: Tensor, rounds: int = 3) -> Tensor:
    """Return how far each instruction of an example was carried out in images in which all of them may vary, float32 `[M, n]`.

    Each instruction is read as by `Reader.responses`, with the others where they were read in the round before. Where two
    regions overlap, such as those of hair length and hair colour, the drawings of one depend on the strength of the other.

    Args:
        example: Person and instructions.
        images: Images, float `[M, 3, SIZE, SIZE]` in [0, 1].
        rounds: Largest number of rounds after a first reading at the complete edit. They end early when nothing changes.

    Raises:
        ValueError: The shape of `images` is wrong.
    """
    reader = Reader(example)
    found = reader.responses(images)
    columns = [INSTRUCTIONS.index(instruction) for instruction in example.instructions]
    touching = [[j for j, b in enumerate(reader.regions) if j != i and (a & b).any()] for i, a in enumerate(reader.regions)]
    before = example.strengths[:, columns].expand_as(found)
    for _ in range(rounds):
        others = (found * _ROUNDED).round() / _ROUNDED
        if torch.equal(others, before):
            break
        before = others
        for index, near in enumerate(touching):
            if not near:
                continue
            for values in others[:, near].unique(dim=0):
                given = example.strengths
                given[0, [columns[j] for j in near]] = values
                same = (others[:, near] == values).all(dim=1)
                found[same, index] = _path(example, index, tuple(given[0].tolist())).nearest(images[same])
    return found


def _check(images: Tensor) -> None:
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"expected images of [M, 3, {SIZE}, {SIZE}], got {tuple(images.shape)}")
