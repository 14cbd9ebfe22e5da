"""Dataset of a user's own images, scored by learned scorers."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case, Phase, Scores
from slideredit_rt.evaluation.scorers import SCORERS, AttributeScorer, DistanceScorer, load_scorer
from slideredit_rt.families import Family
from slideredit_rt.images import open_image
from slideredit_rt.settings import pick_device
from slideredit_rt.sliders import Slider, compose_prompt
from slideredit_rt.spans import PromptToken, find_spans, normalise

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_ORDER_SEED = 0
_EXAMPLE = '{"instructions": ["make her hair curly"], "attributes": ["curly hair"]}'


@dataclass(frozen=True)
class Edit:
    """One line of a prompts file.

    Attributes:
        prompt: Prompt that contains every instruction word for word.
        instructions: Swept instructions.
        attributes: Phrase per instruction that the edited image is compared with.
    """

    prompt: str
    instructions: tuple[str, ...]
    attributes: tuple[str, ...]


def read_edits(path: Path) -> list[Edit]:
    """Read edits from a JSON-lines file with one `{"prompt": "…", "instructions": ["…"], "attributes": ["…"]}` per line.

    `prompt` defaults to the instructions joined by " and ", `attributes` to the instructions. Empty lines are skipped.

    Raises:
        SliderEditError: The file cannot be read or holds no edit, or a line is not as above; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SliderEditError(
            f"prompts file {str(path)!r} cannot be read ({error}); pass a UTF-8 file with lines such as {_EXAMPLE}"
        ) from None
    edits = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                edits.append(_edit(line))
            except SliderEditError as error:
                raise SliderEditError(f"line {number} of {str(path)!r} {error}") from None
    if not edits:
        raise SliderEditError(f"prompts file {str(path)!r} is empty; write lines such as {_EXAMPLE}")
    return edits


def _edit(line: str) -> Edit:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise SliderEditError(f"is not JSON ({error}); write it as {_EXAMPLE}") from None
    if not isinstance(fields, dict) or "instructions" not in fields:
        raise SliderEditError(f"has no instructions; write it as {_EXAMPLE}")
    if unknown := sorted(fields.keys() - {"prompt", "instructions", "attributes"}):
        raise SliderEditError(f"has the unknown field {unknown[0]!r}; use prompt, instructions and attributes")
    instructions = _texts(fields, "instructions")
    attributes = _texts(fields, "attributes") if "attributes" in fields else instructions
    if len(attributes) != len(instructions):
        raise SliderEditError(
            f"has {len(instructions)} instructions and {len(attributes)} attributes; write one attribute per instruction"
        )
    prompt = fields.get("prompt", compose_prompt(instructions))
    if not isinstance(prompt, str):
        raise SliderEditError(f"has the prompt {prompt!r}, which is not a string; write it in quotes")
    prompt = normalise(prompt)
    # Treat each character as a token, to apply the sliders' matching rule without a tokenizer.
    letters = [PromptToken(letter, index, index + 1, index) for index, letter in enumerate(prompt)]
    try:
        find_spans(prompt, [Slider(text) for text in instructions], letters, len(letters) + 1)
    except SliderEditError:
        raise SliderEditError(
            f"has the prompt {prompt!r}, which does not contain all of the instructions "
            f"{', '.join(map(repr, instructions))} word for word and without overlap; write them as in the prompt"
        ) from None
    return Edit(prompt, instructions, attributes)


def _texts(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that must be a list of one or more strings."""
    values = fields[name]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise SliderEditError(f"has {name} {values!r}, which is not a list of non-empty strings; write it as {_EXAMPLE}")
    return tuple(normalise(v).strip() for v in values)


def pair_images(images: Path, prompts: Path) -> dict[str, tuple[Path, Edit]]:
    """Pair every image of a folder with every edit of a prompts file, by unique names that can be part of a file name.

    The order is shuffled, and the same in every run.

    Args:
        images: Folder of images: files that end in .png, .jpg, .jpeg, .webp, .bmp, .tif or .tiff.
        prompts: JSON-lines file, see `read_edits`.

    Raises:
        SliderEditError: The folder contains no images, or the prompts file is not valid.
    """
    try:
        found = sorted(p for p in images.iterdir() if p.is_file() and p.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise SliderEditError(
            f"image folder {str(images)!r} cannot be read ({error.strerror}); pass a folder of images"
        ) from None
    if not found:
        raise SliderEditError(f"image folder {str(images)!r} contains no images; put PNG, JPEG or WebP files into it")
    edits = read_edits(prompts)
    # The number separates "a.png" from "a.jpg", and names that become equal when made safe for file names.
    names = {p: f"{i:04d}-{re.sub(r'[^A-Za-z0-9_-]+', '-', p.stem)[:40]}" for i, p in enumerate(found)}
    entries = [(f"{names[p]}-{line:03d}", p, edit) for p in found for line, edit in enumerate(edits)]
    random.Random(_ORDER_SEED).shuffle(entries)
    return {name: (path, edit) for name, path, edit in entries}


def open_cases(
    entries: Mapping[str, tuple[Path, Edit]], names: Sequence[str], seeds: Iterable[int] | None = None
) -> list[Case]:
    """Open the images of some edits.

    Args:
        entries: Edits from `pair_images`.
        names: Names of the edits.
        seeds: Seed of each edit's noise; None counts from 0.

    Raises:
        SliderEditError: An image cannot be read.
    """
    opened: dict[Path, Image.Image] = {}
    cases = []
    for name, seed in zip(names, itertools.count() if seeds is None else seeds, strict=False):
        path, edit = entries[name]
        if path not in opened:
            opened[path] = open_image(path)
        cases.append(Case(name, opened[path], edit.prompt, edit.instructions, seed))
    return cases


class OwnImages:
    """Every image of a folder with every edit of a prompts file, in a shuffled order that is the same in every run.

    The source is scored as the base model sees it: `preprocess` resizes it to the size of the edit, so the edit is the only
    difference between the two.

    Args:
        images: Folder of images: files that end in .png, .jpg, .jpeg, .webp, .bmp, .tif or .tiff.
        prompts: JSON-lines file, see `read_edits`.
        attribute_scorers: Attribute scorers by name, see `load_scorer`.
        distance_scorers: Distance scorers by name, see `load_scorer`.
        preprocess: Function that resizes an image as the base model's family does, to `[1, 3, H, W]` in [−1, 1]
            (`Family.preprocess`).

    Raises:
        SliderEditError: The folder contains no images, or the prompts file is not valid.
    """

    def __init__(
        self,
        images: Path,
        prompts: Path,
        attribute_scorers: Mapping[str, AttributeScorer],
        distance_scorers: Mapping[str, DistanceScorer],
        preprocess: Callable[[Image.Image], Tensor],
    ) -> None:
        self.images, self.prompts, self.preprocess = images, prompts, preprocess
        self.attribute_scorers, self.distance_scorers = attribute_scorers, distance_scorers
        self._entries = pair_images(images, prompts)
        self._asked: dict[tuple[str, int], int] = {}
        self._source_scores: dict[str, Scores] = {}

    def cases(self, phase: Phase, count: int, sliders: int) -> list[Case]:
        """Return `count` cases whose edits have `sliders` instructions.

        The benchmark takes cases from the start of the shuffled order, the range search from its end. The position of a case
        in that order is the seed of its noise.

        Raises:
            SliderEditError: There are fewer cases than both phases need together, or an image cannot be read.
        """
        names = [name for name, (_, edit) in self._entries.items() if len(edit.instructions) == sliders]
        self._asked[phase, sliders] = count
        wanted = {p: self._asked.get((p, sliders), 0) for p in ("bench", "search")}
        if sum(wanted.values()) > len(names):
            raise SliderEditError(
                f"{str(self.images)!r} and {str(self.prompts)!r} make {len(names)} cases of {sliders} instructions, but the "
                f"benchmark needs {wanted['bench']} and the range search {wanted['search']} others; "
                "add images or prompts, or use fewer cases"
            )
        places = range(count) if phase == "bench" else range(len(names) - count, len(names))
        return open_cases(self._entries, [names[place] for place in places], places)

    def source_scores(self, case: Case) -> Scores:
        """Return the scores of the source image. Its distances are 0, or None where a scorer is undefined for it."""
        if case.name not in self._source_scores:
            (self._source_scores[case.name],) = self.score(case, self._source(case))
        return self._source_scores[case.name]

    def score(self, case: Case, images: Tensor) -> list[Scores]:
        """Return the scores of edited images. `images` is float32 `[N, 3, H, W]` in [0, 1].

        Raises:
            SliderEditError: A scorer that compares pixels got images that differ in size from the preprocessed source.
        """
        _, edit = self._entries[case.name]
        source = self._source(case)
        attributes = {name: scorer.score(images, edit.attributes) for name, scorer in self.attribute_scorers.items()}
        distances = {name: scorer.distance(images, source) for name, scorer in self.distance_scorers.items()}
        return [
            Scores({name: rows[i] for name, rows in attributes.items()}, {name: rows[i] for name, rows in distances.items()})
            for i in range(len(images))
        ]

    def _source(self, case: Case) -> Tensor:
        """Return the preprocessed source, `[1, 3, H, W]` in [0, 1]."""
        return (self.preprocess(case.image).float() + 1) / 2


@dataclass(frozen=True)
class OwnImageOptions:
    """Options for an evaluation on own images.

    Attributes:
        images: Folder of images.
        prompts: JSON-lines file, see `read_edits`.
        attribute_scorers: Names of attribute scorers, from `slideredit_rt.evaluation.scorers.SCORERS`.
        distance_scorers: Names of distance scorers, from the same list.
        sources: Location of a scorer's weights, by the scorer's name; other scorers use their default.
        device: Device of the scorers, `auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes the current GPU if there is one.

    Raises:
        SliderEditError: The device does not exist.
    """

    images: Path
    prompts: Path
    attribute_scorers: Sequence[str] = ("clip", "siglip")
    distance_scorers: Sequence[str] = ("lpips-alex", "dinov2")
    sources: Mapping[str, str] = field(default_factory=dict)
    device: str = "auto"

    def __post_init__(self) -> None:
        pick_device(self.device, "--scorer-device")


def open_own_images(options: OwnImageOptions, family: Family, base: Path) -> OwnImages:
    """Open the dataset for a base checkpoint. Images and prompts are checked before the scorers are loaded.

    Raises:
        SliderEditError: The images or prompts are not valid, or a scorer is unknown, of the wrong type or cannot be loaded.
    """
    names = (*options.attribute_scorers, *options.distance_scorers)
    if unknown := [name for name in names if name not in SCORERS]:
        raise SliderEditError(f"{unknown[0]!r} is not a scorer; choose from {', '.join(SCORERS)}")
    sorts = ((options.attribute_scorers, AttributeScorer), (options.distance_scorers, DistanceScorer))
    if odd := [name for wanted, sort in sorts for name in wanted if not issubclass(SCORERS[name], sort)]:
        right = "attribute" if issubclass(SCORERS[odd[0]], AttributeScorer) else "distance"
        raise SliderEditError(f"scorer {odd[0]!r} is in the wrong list; move it to the {right} scorers")
    if not options.attribute_scorers:
        raise SliderEditError("the list of attribute scorers is empty; name at least one, such as clip")
    preprocess = partial(family.preprocess, family.load_pipeline(base, transformer=False))
    images = OwnImages(options.images, options.prompts, {}, {}, preprocess)
    device = str(pick_device(options.device, "--scorer-device"))
    loaded = {name: load_scorer(name, options.sources.get(name), device) for name in names}
    images.attribute_scorers = {n: s for n, s in loaded.items() if isinstance(s, AttributeScorer)}
    images.distance_scorers = {n: s for n, s in loaded.items() if isinstance(s, DistanceScorer)}
    return images
