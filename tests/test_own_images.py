"""A user's own images as a dataset of the benchmark: which cases they make, what is scored, and what is refused."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Scores
from slideredit_rt.evaluation.own_images import Edit, OwnImages, read_edits
from slideredit_rt.evaluation.scorers import AttributeScorer, DistanceScorer, load_scorer

EDITS = [
    {"instructions": ["make her smile"], "attributes": ["a smile"]},
    {"instructions": ["make his hair curly"]},
    {
        "prompt": "Please make it night, and add fog.",
        "instructions": ["make it night", "add fog"],
        "attributes": ["night", "fog"],
    },
]


class Brightness(AttributeScorer):
    """A phrase's length times the mean of the image: shows which phrases were asked for."""

    name = "brightness"

    def __init__(self) -> None:
        pass

    def score(self, images: Tensor, phrases: Sequence[str]) -> list[tuple[float, ...]]:
        return [tuple(len(phrase) * image.mean().item() for phrase in phrases) for image in images]


class Difference(DistanceScorer):
    """Largest difference in any pixel; none where the image is black."""

    name = "difference"

    def __init__(self) -> None:
        self.sources: list[Tensor] = []

    def distance(self, images: Tensor, source: Tensor) -> list[float | None]:
        self.sources.append(source)
        return [(image - source[0]).abs().max().item() if image.any() else None for image in images]


def _half(image: Image.Image) -> Tensor:
    """A family that edits at half the size."""
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(small.height, small.width, 3)
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of one colour each, and a file that is none."""
    images = tmp_path / "images"
    images.mkdir()
    for name, grey in (("anna.png", 51), ("anna.jpg", 102), ("Ünï code!.webp", 204)):
        Image.new("RGB", (32, 48), (grey,) * 3).save(images / name, lossless=True, quality=100)
    (images / "notes.txt").write_text("not an image")
    return images


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text("\n\n".join(map(json.dumps, EDITS)) + "\n")
    return path


@pytest.fixture
def images(folder: Path, prompts: Path) -> OwnImages:
    return OwnImages(folder, prompts, {"brightness": Brightness()}, {"difference": Difference()}, _half)


def test_a_line_needs_its_instructions_only(prompts: Path) -> None:
    assert read_edits(prompts) == [
        Edit("make her smile", ("make her smile",), ("a smile",)),
        Edit("make his hair curly", ("make his hair curly",), ("make his hair curly",)),
        Edit("Please make it night, and add fog.", ("make it night", "add fog"), ("night", "fog")),
    ]


def test_an_instruction_that_appears_twice_may_be_asked_for_twice(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps({"instructions": ["make it red", "make it red"]}))
    assert read_edits(path)[0].prompt == "make it red and make it red"


def test_every_image_meets_every_edit_with_as_many_instructions(images: OwnImages) -> None:
    single, double = images.cases("bench", 6, 1), images.cases("bench", 3, 2)
    assert len({(case.image.getpixel((0, 0)), case.prompt) for case in single}) == 6
    assert {case.prompt for case in single} == {"make her smile", "make his hair curly"}
    assert {case.instructions for case in double} == {("make it night", "add fog")}
    names = [case.name for case in single + double]
    assert len(set(names)) == 9
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)
    # In no order of the folder or of the file.
    assert names[:6] != sorted(names[:6])


def test_search_and_bench_share_no_case_and_the_order_is_the_same_in_every_run(
    images: OwnImages, folder: Path, prompts: Path
) -> None:
    bench, search = images.cases("bench", 4, 1), images.cases("search", 2, 1)
    assert not {case.name for case in bench} & {case.name for case in search}
    assert [case.seed for case in bench + search] == [0, 1, 2, 3, 4, 5]
    again = OwnImages(folder, prompts, {}, {}, _half)
    assert [c.name for c in again.cases("search", 2, 1)] == [c.name for c in search]
    # More of them begins with the same ones.
    assert [c.name for c in again.cases("bench", 3, 1)] == [c.name for c in bench[:3]]


def test_too_few_pairs_for_both_phases_are_refused(images: OwnImages) -> None:
    images.cases("bench", 4, 1)
    images.cases("search", 2, 1)
    with pytest.raises(SliderEditError, match=r"make 6 cases of 1 instructions, .* benchmark needs 4 and the range search 3 "):
        images.cases("search", 3, 1)
    with pytest.raises(SliderEditError, match=r"make 0 cases of 3 instructions"):
        images.cases("bench", 1, 3)


def test_scores_are_of_the_attribute_phrases_and_against_the_source_at_the_size_of_the_edit(images: OwnImages) -> None:
    case = next(c for c in images.cases("bench", 3, 2) if c.image.getpixel((0, 0)) == (51,) * 3)
    white, black = torch.ones(1, 3, 24, 16), torch.zeros(1, 3, 24, 16)
    bright, dark = images.score(case, torch.cat([white, black]))
    assert bright.attributes == {"brightness": (len("night"), len("fog"))}
    assert bright.distances == {"difference": pytest.approx(0.8)}
    # No distance is a result, too: it is not left out.
    assert dark == Scores({"brightness": (0, 0)}, {"difference": None})
    difference = images.distance_scorers["difference"]
    assert isinstance(difference, Difference)
    assert difference.sources[0].shape == (1, 3, 24, 16)


def test_the_source_is_scored_once_as_the_base_model_is_shown_it(images: OwnImages) -> None:
    case = next(
        c for c in images.cases("bench", 6, 1) if c.prompt == "make her smile" and c.image.getpixel((0, 0)) == (204,) * 3
    )
    scores = images.source_scores(case)
    assert scores.attributes == {"brightness": pytest.approx((0.8 * len("a smile"),))}
    assert scores.distances == {"difference": 0}
    assert images.source_scores(case) is scores
    difference = images.distance_scorers["difference"]
    assert isinstance(difference, Difference)
    assert len(difference.sources) == 1


def test_a_learned_scorer_reads_the_same_image_as_it_would_alone(folder: Path, prompts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.BitImageProcessorPil(**size).save_pretrained(tmp_path / "dinov2")
    scorer = load_scorer("dinov2", str(tmp_path / "dinov2"))
    assert isinstance(scorer, DistanceScorer)
    images = OwnImages(folder, prompts, {}, {"dinov2": scorer}, _half)
    case = images.cases("bench", 1, 1)[0]
    edit = torch.rand(1, 3, 24, 16)
    assert images.source_scores(case).distances["dinov2"] == pytest.approx(0, abs=1e-6)
    alone = scorer.distance(edit, (_half(case.image) + 1) / 2)
    assert [s.distances["dinov2"] for s in images.score(case, torch.cat([edit, edit]))] == pytest.approx(alone * 2, abs=1e-6)


def test_a_folder_without_images_is_refused(tmp_path: Path, prompts: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SliderEditError, match=r"'.*empty' contains no images; put PNG"):
        OwnImages(tmp_path / "empty", prompts, {}, {}, _half)
    with pytest.raises(SliderEditError, match=r"'.*nowhere' cannot be read \(No such file or directory\); pass a folder"):
        OwnImages(tmp_path / "nowhere", prompts, {}, {}, _half)


def test_a_damaged_image_is_named_before_anything_is_rendered(folder: Path, prompts: Path) -> None:
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SliderEditError, match=r"torn\.png' cannot be read"):
        OwnImages(folder, prompts, {}, {}, _half).cases("bench", 8, 1)


def test_a_prompts_file_that_is_missing_or_empty_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SliderEditError, match=r"'.*none\.jsonl' cannot be read .*; pass a UTF-8 file with lines such as \{"):
        OwnImages(folder, tmp_path / "none.jsonl", {}, {}, _half)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SliderEditError, match=r"'.*binary' cannot be read"):
        read_edits(tmp_path / "binary")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(SliderEditError, match=r"'.*empty' is empty; write lines such as"):
        read_edits(tmp_path / "empty")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make it red", r"is not JSON \(.*\); write it as \{"),
        ('["make it red"]', "has no instructions"),
        ('{"prompt": "make it red"}', "has no instructions"),
        ('{"instructions": []}', r"has instructions \[\], which is not a list of non-empty strings"),
        ('{"instructions": "make it red"}', "has instructions 'make it red', which is not a list"),
        ('{"instructions": ["make it red"], "attributes": [" "]}', r"has attributes \[' '\], which is not a list"),
        ('{"instructions": ["make it red"], "attributes": ["red", "blue"]}', "has 1 instructions and 2 attributes; write one"),
        ('{"instructions": ["make it red"], "attribute": ["red"]}', "has the unknown field 'attribute'; use prompt"),
        ('{"instructions": ["make it red"], "prompt": 3}', "has the prompt 3, which is not a string"),
        (
            '{"instructions": ["make it red"], "prompt": "make it reddish"}',
            "has the prompt 'make it reddish', which does not contain .* 'make it",
        ),
        ('{"instructions": ["make it red", "it red"], "prompt": "make it red"}', ".*word for word and without overlap"),
        ('{"instructions": ["red", "red"], "prompt": "make it red"}', ".*the instructions 'red', 'red' word for word"),
    ],
)
def test_a_line_that_is_no_edit_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(f'{{"instructions": ["make it red"]}}\n\n{line}\n')
    with pytest.raises(SliderEditError, match=rf"^line 3 of '.*edits\.jsonl' {message}"):
        read_edits(path)
