"""The portraits world: people, exact edits of any strength, and a reader that measures them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.portraits import drawing
from slideredit_rt.portraits.measurer import Reader
from slideredit_rt.portraits.person import RANGES
from slideredit_rt.portraits.world import (
    ATTRIBUTES,
    INSTRUCTIONS,
    LAYERS,
    PARAMETERS,
    SIZE,
    Example,
    Instruction,
    applicable,
    draw_people,
    edit,
    find_instruction,
    held_out_examples,
    portrait_image,
    render,
    render_with_layers,
    sample_instructions,
)

SEEN = {
    "expression": {"mouth", "brows", "eyes"},
    "hair colour": {"hair", "brows", "beard"},
    "eye size": {"eyes", "brows"},
    "eyelids": {"eyes"},
    "skin": {"skin", "mouth", "eyes", "beard", "glasses"},
    "beard": {"beard"},
    "glasses": {"glasses"},
    "clothes": {"clothes"},
}
"""Layers that show each of these attributes: nothing changes away from them."""

texts = pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda i: i.text.replace(" ", "-"))


def people(count: int, seed: int = 0) -> Tensor:
    return draw_people(count, torch.Generator().manual_seed(seed))


def at(strength: float, *instructions: Instruction) -> Tensor:
    """Strengths `[1, I]` of the instructions."""
    return torch.tensor([[strength if i in instructions else 0.0 for i in INSTRUCTIONS]])


def someone(instruction: Instruction) -> Tensor:
    """A person whom the instruction changes, `[1, P]`."""
    crowd = people(64)
    return crowd[applicable(crowd)[:, INSTRUCTIONS.index(instruction)]][:1]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squared distance of images, `[N]`."""
    return (a - b).square().flatten(1).mean(1).sqrt()


def test_people_are_reproducible_and_differ() -> None:
    crowd = people(32, seed=4)
    assert crowd.shape == (32, len(PARAMETERS))
    assert crowd.dtype == torch.float32
    assert torch.equal(crowd, people(32, seed=4))
    low, high = torch.tensor(list(RANGES.values())).unbind(1)
    assert ((crowd >= low) & (crowd <= high)).all()
    images = render(crowd)
    assert torch.equal(images, render(crowd))
    apart = torch.cdist(images.flatten(1), images.flatten(1)) / (3 * SIZE * SIZE) ** 0.5
    assert apart[~torch.eye(32, dtype=torch.bool)].min() > 0.03, "no two of them look alike"


def test_a_batch_is_drawn_like_its_people_one_by_one() -> None:
    crowd = edit(people(6), torch.rand(6, len(INSTRUCTIONS), generator=torch.Generator().manual_seed(1)) * 0.3)
    image, coverage = render_with_layers(crowd)
    assert image.shape == (6, 3, SIZE, SIZE)
    assert coverage.shape == (6, len(LAYERS), SIZE, SIZE)
    torch.testing.assert_close(image, torch.cat([render(one) for one in crowd.split(1)]))
    torch.testing.assert_close(coverage, torch.cat([render_with_layers(one)[1] for one in crowd.split(1)]))
    for drawn in (image, coverage):
        assert drawn.min() >= 0
        assert drawn.max() <= 1
    assert coverage.sum(1).max() <= 1 + 1e-5, "layers are visible coverages"


def test_drawing_needs_no_value_on_the_host() -> None:
    """Parameters on the meta device have no values, so anything that reads one or leaves the device would fail."""
    crowd = people(2).to("meta")
    edited = edit(crowd, torch.zeros(2, len(INSTRUCTIONS), device="meta"))
    image, coverage = render_with_layers(edited)
    assert image.device.type == coverage.device.type == applicable(crowd).device.type == "meta"


def test_windows_cut_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    added = ("make the hair curly", "add a beard", "make the person older", "add blush", "make the person surprised")
    extreme = edit(people(12), at(1.5, *map(find_instruction, added)))
    long = edit(people(12), at(2.0, find_instruction("make the hair longer"), find_instruction("add a hat")))
    crowd = torch.cat([people(12), extreme, long])
    cut = render(crowd)
    everything = (slice(0, SIZE), slice(0, SIZE))
    for name in [name for name, value in vars(drawing).items() if name.isupper() and isinstance(value, tuple)]:
        if isinstance(getattr(drawing, name)[0], slice):
            monkeypatch.setattr(drawing, name, everything)
    assert (render(crowd) - cut).abs().max() < 0.03


@texts
def test_an_edit_is_continuous_in_its_strength(instruction: Instruction) -> None:
    step = 1 / 64
    strengths = torch.tensor([-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.75])
    person = someone(instruction).expand(len(strengths), -1)
    one = at(1.0, instruction)
    before, after = (render(edit(person, s[:, None] * one)) for s in (strengths, strengths + step))
    whole = distance(render(edit(person[:1], one)), render(person[:1]))
    assert (distance(before, after) < 6 * step * whole).all()


@texts
def test_strength_orders_the_images(instruction: Instruction) -> None:
    """Stronger edits are further from the source, also beyond the complete edit."""
    strengths = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
    person = someone(instruction).expand(len(strengths), -1)
    images = render(edit(person, strengths[:, None] * at(1.0, instruction)))
    assert torch.equal(images[0], render(person[:1])[0])
    assert (images[1:] - images[:-1]).flatten(1).abs().amax(1).min() > 0.02
    near = distance(images[:5], images[:1])
    assert (near.diff() > 0).all()


def test_edits_of_different_attributes_commute() -> None:
    moved = {i: (edit(person := someone(i), at(1.5, i)) != person).squeeze(0) for i in INSTRUCTIONS}
    for a in INSTRUCTIONS:
        assert moved[a].any()
        for b in INSTRUCTIONS:
            assert a.attribute == b.attribute or not (moved[a] & moved[b]).any(), f"{a.text} and {b.text}"
    for example in held_out_examples(16, 3):
        a, b, c = example.instructions
        one_by_one = edit(edit(edit(example.people, at(0.7, c)), at(1.0, a)), at(1.3, b))
        torch.testing.assert_close(one_by_one, edit(example.people, at(0.7, c) + at(1.0, a) + at(1.3, b)))


@pytest.mark.parametrize("attribute", SEEN)
def test_nothing_changes_outside_of_the_parts_that_show_an_edit(attribute: str) -> None:
    for instruction in (i for i in INSTRUCTIONS if i.attribute == attribute):
        person = someone(instruction)
        pair = torch.cat([person, edit(person, at(1.0, instruction))])
        image, coverage = render_with_layers(pair)
        shown = coverage[:, [LAYERS.index(name) for name in SEEN[attribute]]].amax((0, 1))
        near = torch.nn.functional.max_pool2d(shown[None], 7, stride=1, padding=3)[0] > 0
        change = (image[1] - image[0]).abs().amax(0)
        assert change[near].max() > 0.1
        assert change[~near].max() < 0.01, instruction.text


def test_the_background_changes_only_where_it_is_seen() -> None:
    instruction = find_instruction("make the background blue")
    person = someone(instruction)
    image, coverage = render_with_layers(torch.cat([person, edit(person, at(1.0, instruction))]))
    covered = coverage[0].sum(0) > 1 - 1e-5
    change = (image[1] - image[0]).abs().amax(0)
    assert change[covered].max() < 1e-4
    assert change[coverage[0].sum(0) == 0].min() > 0.1


def test_an_instruction_applies_only_if_it_would_be_seen() -> None:
    crowd = people(200)
    usable = applicable(crowd)
    assert usable.shape == (200, len(INSTRUCTIONS))
    assert usable.any(0).all(), "each applies to someone"
    for row, instruction in enumerate(INSTRUCTIONS):
        chosen = crowd[usable[:, row]][:4]
        done = edit(chosen, at(1.0, instruction))
        change = (render(done) - render(chosen)).abs().amax(1).flatten(1)
        assert ((change > 0.08).sum(1) > 40).all(), f"{instruction.text} is seen in more than 40 pixels"
        if instruction.towards:
            assert not applicable(done)[:, row].any(), f"{instruction.text} is done"
    bearded = crowd[:, PARAMETERS.index("beard")] > 0.5
    assert bearded.any()
    assert not usable[bearded, INSTRUCTIONS.index(find_instruction("add a beard"))].any()


def test_sampled_instructions_apply_and_do_not_contradict_each_other() -> None:
    crowd, counts = people(400), torch.arange(400) % 4
    strengths = sample_instructions(crowd, counts, torch.Generator().manual_seed(3))
    assert torch.equal(strengths, sample_instructions(crowd, counts, torch.Generator().manual_seed(3)))
    assert torch.equal(strengths.sum(1), counts.float())
    assert applicable(crowd)[strengths > 0].all()
    for attribute in ATTRIBUTES:
        assert strengths[:, [i.attribute == attribute for i in INSTRUCTIONS]].sum(1).max() <= 1
    assert (strengths.sum(0) > 5).all(), "every instruction is drawn"


def test_words_are_told_apart_by_the_next_two() -> None:
    """The text encoder mixes a token with the two after it, so the last three words must identify an instruction."""
    ends = [" ".join(i.text.split()[-3:]) for i in INSTRUCTIONS]
    assert len(set(ends)) == len(INSTRUCTIONS)
    with pytest.raises(SliderEditError, match="'make the person taller' is not an instruction of the portraits world"):
        find_instruction("make the person taller")


def test_held_out_people_are_the_same_every_time() -> None:
    def key(examples: list[Example]) -> list[tuple[list[float], str]]:
        return [(e.people[0].tolist(), e.prompt) for e in examples]

    assert key(held_out_examples(3, 2)) == key(held_out_examples(3, 2))
    assert key(held_out_examples(3, 2)) != key(held_out_examples(3, 2, seed=1))
    example = held_out_examples(3, 2)[0]
    assert example.strengths.sum() == 2
    assert example.prompt == " and ".join(i.text for i in example.instructions)
    assert portrait_image(example).size == (SIZE, SIZE)


@texts
def test_strengths_are_read_back(instruction: Instruction) -> None:
    known = torch.tensor([0.0, 0.31, 0.5, 0.77, 1.0, 1.36])
    person = someone(instruction)
    images = render(edit(person.expand(len(known), -1), known[:, None] * at(1.0, instruction)))
    reader = Reader(Example(person, (instruction,)))
    torch.testing.assert_close(reader.responses(images)[:, 0], known, atol=0.02, rtol=0)
    noise = 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reader.responses(images + noise)[:, 0], known, atol=0.12, rtol=0)


@pytest.mark.parametrize(("count", "number"), [(2, 3), (3, 1)])
def test_strengths_are_read_beside_other_edits(count: int, number: int) -> None:
    known = torch.tensor([0.2, 0.9])
    for example in held_out_examples(number, count, seed=5):
        reader = Reader(example)
        for place, instruction in enumerate(example.instructions):
            strengths = example.strengths - at(1.0, instruction) + known[:, None] * at(1.0, instruction)
            images = render(edit(example.people.expand(2, -1), strengths))
            torch.testing.assert_close(reader.responses(images)[:, place], known, atol=0.02, rtol=0)


def test_an_edit_beside_one_at_another_strength_is_read_with_that_strength() -> None:
    closed, dark = find_instruction("make the eyes closed"), find_instruction("add sunglasses")
    person = someone(closed)
    example = Example(person, (closed, dark))
    images = render(edit(person, at(0.6, closed) + at(0.4, dark)))
    read = Reader(example, at(0.6, closed) + at(0.4, dark)).responses(images)
    torch.testing.assert_close(read, torch.tensor([[0.6, 0.4]]), atol=0.02, rtol=0)


def test_a_blend_of_source_and_edit_reads_in_between() -> None:
    example = Example(person := someone(INSTRUCTIONS[0]), INSTRUCTIONS[:1])
    source, target = render(person), render(example.target)
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    read = Reader(example).responses(torch.lerp(source, target, shares[:, None, None, None]))[:, 0]
    assert (read.diff() > 0.05).all()
    assert read[0].abs() < 0.01
    assert (read[-1] - 1).abs() < 0.01


def test_drift_is_the_distance_outside_of_all_edits() -> None:
    (example,) = held_out_examples(1, 2, seed=8)
    reader = Reader(example)
    exact = render(example.target)
    spoiled_outside = exact + 0.1 * reader.untouched
    spoiled_inside = exact + 0.1 * ~reader.untouched
    drift = reader.drift(torch.cat([exact, render(example.people), spoiled_outside, spoiled_inside]))
    assert drift is not None
    assert drift[0] == 0
    assert drift[1] < 0.01
    torch.testing.assert_close(drift[2:], torch.tensor([0.1, 0.0]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"expected images of \[M, 3, 128, 128\]"):
        reader.drift(exact[..., :64])
