"""Exact reading of edited portraits.

The correct result of an instruction is known for every strength, so the response of an image is the strength whose drawing is
nearest to it, and the identity drift is its distance to the drawing where no instruction changes anything.
"""

from __future__ import annotations

from functools import cached_property

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


class Reader:
    """Reads edited images of one example.

    Args:
        example: Person and instructions.
        strengths: Strengths of the other instructions while one of them is read, `[1, I]`. The default is the complete edit.
    """

    def __init__(self, example: Example, strengths: Tensor | None = None) -> None:
        self.example = example
        self.given = example.strengths if strengths is None else strengths
        self.steps = torch.arange(_FIRST, _LAST + _STEP / 2, _STEP)
        paths = [self._path(INSTRUCTIONS.index(instruction)) for instruction in example.instructions]
        self.regions = [self._region(drawings) for drawings in paths]
        self.paths = [drawings[:, :, region] for drawings, region in zip(paths, self.regions, strict=True)]

    def _path(self, column: int) -> Tensor:
        """Return the drawings at each strength of an instruction, `[K, 3, SIZE, SIZE]`."""
        strengths = self.given.repeat(len(self.steps), 1)
        strengths[:, column] = self.steps
        return render(edit(self.example.people.expand(len(strengths), -1), strengths))

    def _region(self, drawings: Tensor) -> Tensor:
        """Return the pixels that visibly change between strengths 0 and 1.5, bool `[SIZE, SIZE]`."""
        start = drawings[self.steps == 0]
        passed = drawings[(self.steps >= 0) & (self.steps <= _SEEN_UP_TO)]
        return ((passed - start).abs() > _VISIBLE).any(dim=0).any(dim=0)

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
        pairs = zip(self.paths, self.regions, strict=True)
        return torch.stack([self._nearest(images[:, :, region], path) for path, region in pairs], dim=1)

    def _nearest(self, pixels: Tensor, path: Tensor) -> Tensor:
        """Return the strengths at which a path `[K, 3, R]` is nearest to pixels `[M, 3, R]`, `[M]`."""
        path = path.flatten(1)
        squared = torch.cdist(pixels.flatten(1).to(path), path, compute_mode="donot_use_mm_for_euclid_dist")
        squared = squared.double().square()  # in single precision rounding would decide between equal distances
        length = (path[1:] - path[:-1]).square().sum(dim=1).double()
        near, far = squared[:, :-1], squared[:, 1:]
        share = ((near - far + length) / (2 * length.clamp(min=1e-12))).clamp(0, 1)
        apart = near + share * (far - near) - share * (1 - share) * length
        strength = self.steps[:-1] + share * _STEP
        # Where the path stands still, all strengths are equally near, and the one closest to 0 counts.
        best = (apart + 1e-9 * strength.abs()).argmin(dim=1, keepdim=True)
        return strength.gather(1, best)[:, 0].float()

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
            alone = Example(example.people, (example.instructions[index],))
            for values in others[:, near].unique(dim=0):
                given = example.strengths
                given[0, [columns[j] for j in near]] = values
                same = (others[:, near] == values).all(dim=1)
                found[same, index] = Reader(alone, given).responses(images[same])[:, 0]
    return found


def _check(images: Tensor) -> None:
    if images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"expected images of [M, 3, {SIZE}, {SIZE}], got {tuple(images.shape)}")
