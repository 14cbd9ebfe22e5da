"""The shapes world: exact edits, and a measurer that reads them back."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from slideredit_rt.shapes.measurer import area, measure, response
from slideredit_rt.shapes.world import (
    ALL_INSTRUCTIONS,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    Instruction,
    draw_example,
    draw_scene,
    held_out_examples,
    render,
)


def test_every_attribute_is_read_back_from_the_image() -> None:
    scenes = [draw_scene(random.Random(seed)) for seed in range(32)]
    for scene, measured in zip(scenes, measure(render(scenes), scenes), strict=True):
        assert measured.background == pytest.approx(scene.background, abs=1e-3)
        for name in SHAPES:
            shape = scene.shape(name)
            assert measured.colour[name] == pytest.approx(shape.colour, abs=1e-3)
            assert measured.area[name] == pytest.approx(area(name, shape), rel=0.02)
            assert measured.position[name] == pytest.approx((shape.x, shape.y), abs=0.1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_response_is_zero_on_the_source_and_one_on_the_target(count: int) -> None:
    examples = held_out_examples(24, count)
    scenes = [e.scene for e in examples]
    source = measure(render(scenes), scenes)
    target = measure(render(e.target for e in examples), scenes)
    for example, before, after in zip(examples, source, target, strict=True):
        for instruction in example.instructions:
            assert response(before, instruction, example.scene) == pytest.approx(0, abs=0.02)
            assert response(after, instruction, example.scene) == pytest.approx(1, abs=0.02)


def test_response_is_linear_in_a_blend_of_source_and_target() -> None:
    example = held_out_examples(1, 1, seed=5)[0]
    source, target = render([example.scene]), render([example.target])
    for share in (0.25, 0.5, 0.75):
        (measured,) = measure(torch.lerp(source, target, share), [example.scene])
        assert response(measured, example.instructions[0], example.scene) == pytest.approx(share, abs=0.05)


def test_shapes_never_overlap_and_stay_inside() -> None:
    for seed in range(200):
        scene = draw_scene(random.Random(seed))
        a, b = scene.circle, scene.square
        assert max(abs(a.x - b.x), abs(a.y - b.y)) > 1.35 * (a.radius + b.radius)
        for shape in (a, b):
            assert 1.35 * shape.radius <= min(shape.x, shape.y, SIZE - shape.x, SIZE - shape.y)


def test_every_instruction_of_an_example_changes_something_and_none_conflict() -> None:
    for seed in range(100):
        example = draw_example(random.Random(seed), 3)
        assert len({i.attribute for i in example.instructions}) == 3
        assert all(i.apply(example.scene) != example.scene for i in example.instructions)


def test_the_whole_vocabulary_is_there() -> None:
    texts = {i.text for i in ALL_INSTRUCTIONS}
    assert len(texts) == 2 * (len(COLOURS) + 2) + len(BACKGROUNDS)
    assert Instruction("circle", "larger").text == "make the circle larger"


def test_held_out_scenes_are_the_same_every_time() -> None:
    assert held_out_examples(3, 2) == held_out_examples(3, 2)
    assert held_out_examples(3, 2) != held_out_examples(3, 2, seed=1)


def test_a_sample_image_does_not_load_the_trainers() -> None:
    """Neither for the HTTP page, nor for the demo and its measured sweeps."""
    script = """
import sys
import slideredit_rt.demo
import slideredit_rt.serving.app
from slideredit_rt.samples import SAMPLES
sizes = [sample.open().size for sample in SAMPLES.values()]
print(sizes, [name for name in sys.modules if name.startswith("slideredit_rt.training")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[(128, 128), (64, 64)] []\n"
