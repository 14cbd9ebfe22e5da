"""Edits on a stand-in card, in a process of their own; prints what each one did as JSON (see `tests/test_card.py`)."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen_checkpoint import qwen_adapter, random_image, save_tiny_checkpoint
from scorer_checkpoints import save_scorer_checkpoints
from standin import CARD, StandIn
from torch import Tensor

from slideredit_rt.assets import resolve_base
from slideredit_rt.bench.columns import engine_for
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.inductor import InductorEngine
from slideredit_rt.evaluation.scorers import AttributeScorer, DistanceScorer, load_scorer
from slideredit_rt.families import get_family
from slideredit_rt.portraits.editor_recipe import SIZES, editor_recipe
from slideredit_rt.serving.requests import EditRequest
from slideredit_rt.serving.service import EditService
from slideredit_rt.shapes.adapter_recipes import BalancedShapes, ShapesData
from slideredit_rt.shapes.world import find_instruction
from slideredit_rt.sliders import Slider
from slideredit_rt.training.attribute_offsets import OffsetConfig, OffsetTrainer
from slideredit_rt.training.concepts import ConceptConfig, ConceptTrainer
from slideredit_rt.training.embedded.loop import Budget, Loop
from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer
from slideredit_rt.training.trainer import Trainer

STEPS = 3
INSTRUCTIONS = ("make the circle red", "make the square blue")
SCORERS_ON_CARD = ("clip", "siglip", "blip-itm", "dinov2")
_SHORT: dict[str, Any] = {"steps": 3, "batch": 2, "learning_rate": 1e-3}
KNOWN = [find_instruction(text) for text in INSTRUCTIONS]
_CONTRAST = {**_SHORT, "attributes": INSTRUCTIONS}


def _trainer(kind: Any, config: Any, data: Any) -> Callable[[Any, Path, torch.device], Trainer[Any]]:
    def make(pipeline: Any, out: Path, device: torch.device) -> Trainer[Any]:
        made: Trainer[Any] = kind(get_family("flux_kontext"), pipeline, data, config, out, device)
        return made

    return make


TRAINERS = {
    "st": _trainer(SuppressionTrainer, SuppressionConfig(kind="st", rank=4, **_SHORT), ShapesData()),
    "gst": _trainer(SuppressionTrainer, SuppressionConfig(kind="gst", target="neutral", rank=4, **_SHORT), ShapesData()),
    "concepts": _trainer(ConceptTrainer, ConceptConfig(rank=2, **_CONTRAST), BalancedShapes(KNOWN)),
    "offsets": _trainer(OffsetTrainer, OffsetConfig(**_CONTRAST), BalancedShapes(KNOWN)),
}


class Service(EditService):
    """An edit service whose threads see the card."""

    card: StandIn

    def _make_steps(self) -> None:
        with self.card.beside("loop"):
            super()._make_steps()

    def _run_pipeline(self) -> None:
        with self.card.beside("encode and decode"):
            super()._run_pipeline()


def put_on_card(editor: SliderEditor) -> None:
    """Move what an editor holds onto the card, including its engine."""
    editor.pipeline.to(CARD)
    if isinstance(editor.engine, InductorEngine):
        editor.engine.device = CARD


def watch_loop(editor: SliderEditor, card: StandIn, fault: Callable[[Tensor], Tensor]) -> None:
    """Tell the card when the denoising loop runs, and put `fault` into each of its steps."""
    predict, decode = editor.family.predict, editor.decode

    def stepping(engine: Any, inputs: Any, latents: Tensor, *rest: Any) -> Tensor:
        card.phase = "loop"
        return predict(engine, inputs, fault(latents), *rest)

    def decoding(latents: Tensor, *size: int) -> Tensor:
        card.phase = "decode"
        return decode(latents, *size)

    editor.family.__dict__["predict"] = stepping
    editor.__dict__["decode"] = decoding


def run_edit(make: Callable[[], SliderEditor], fault: Callable[[Tensor], Tensor], sliders: int) -> dict[str, Any]:
    """Edit on the CPU and on the card."""
    torch.manual_seed(0)
    image, wanted = random_image(), [Slider(text, 0.5) for text in INSTRUCTIONS[:sliders]]
    strengths = [[0.5] * sliders, [1.5] * sliders]
    expected = (editor := make()).render_tensor(editor.prepare(image, wanted), strengths, steps=STEPS)
    card, editor, problem = StandIn(), make(), ""
    with card:
        put_on_card(editor)
        card.events.clear()
        watch_loop(editor, card, fault)
        card.phase = "encode"
        try:
            prepared = editor.prepare(image, wanted)
            places = {str(t.device) for t in (*prepared.conditioning.inputs.values(), prepared.conditioning.latents)}
            pixels = editor.render_tensor(prepared, strengths, steps=STEPS)
            difference = float((pixels - expected).abs().max())
        except RuntimeError as error:
            problem, places, difference = str(error), set(), float("nan")
    editor.family.__dict__.pop("predict")
    return {"difference": difference, "places": sorted(places), "problem": problem, **counts(card)}


def counts(card: StandIn) -> dict[str, Any]:
    """Events by phase: kind, place and number."""
    found: dict[str, Counter[str]] = {}
    for event in card.events:
        found.setdefault(event.phase, Counter())[f"{event.kind} at {event.where}"] += 1
    return {"events": {phase: dict(counter) for phase, counter in found.items()}}


def run_service() -> dict[str, Any]:
    """Serve two requests on the card, one with partial images, beside the same on the CPU."""
    requests = [
        EditRequest(image=random_image(), sliders=(Slider(INSTRUCTIONS[0]),), strengths=((0.25,), (1.25,)), partial_every=every)
        for every in (0, 1)
    ]
    images: list[Tensor] = []
    card = StandIn()
    for device in ("cpu", "card"):
        editor = SliderEditor.from_pretrained("shapes-kontext", "shapes-st")
        inside: AbstractContextManager[Any] = nullcontext() if device == "cpu" else card
        with inside:
            if device == "card":
                put_on_card(editor)
                Service.card = card
            card.events.clear()
            with (EditService if device == "cpu" else Service)(editor) as service:
                tickets = [service.submit(request, on_partial=lambda partial: None) for request in requests]
                done = [image for ticket in tickets for image in ticket.future.result(120)]
                images.append(torch.stack([torch.tensor(list(image.tobytes())) for image in done]))
    return {"difference": int((images[0] - images[1]).abs().max()), **counts(card)}


def run_training(make: Callable[[Any, Path, torch.device], Trainer[Any]], folder: Path) -> dict[str, Any]:
    """Train for a few steps on the CPU and on the card."""
    trained: list[list[Tensor]] = []
    card, places = StandIn(), set[str]()
    for device in (torch.device("cpu"), CARD):
        pipeline = get_family("flux_kontext").load_pipeline(resolve_base("shapes-kontext"))
        inside: AbstractContextManager[Any] = nullcontext() if device.type == "cpu" else card
        with inside:
            trainer = make(pipeline, folder / f"{device.type}.safetensors", device)
            card.events.clear()
            card.phase = "steps"
            trainer.train(progress=False)
            card.phase = "afterwards"
            places = {t.device.type for t in (*trainer.module.parameters(), *pipeline.vae.parameters())}
            trained.append([p.detach().cpu() for p in trainer.module.parameters() if p.requires_grad])
    difference = max(float((a - b).abs().max()) for a, b in zip(*trained, strict=True))
    size = max(float(a.abs().max()) for a in trained[0])
    return {"difference": difference, "size": size, "places": sorted(places), **counts(card)}


class CardGenerator(torch.Generator):
    """A random number generator of the card, with the numbers of the CPU's."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD


def run_editor_stages(folder: Path) -> dict[str, Any]:
    """Train every stage of the portraits recipe on the card, with a tiny model, until pools have drawn new examples."""
    recipe = editor_recipe(replace(SIZES, widths=(8, 8, 8, 8), heads=1, dual=1, single=1))
    card, plain = StandIn(), torch.Generator
    with pytest.MonkeyPatch.context() as patch, card:
        patch.setattr(
            torch, "Generator", lambda device="cpu": CardGenerator() if torch.device(device) == CARD else plain(device)
        )
        patch.setattr(torch, "autocast", lambda *_: nullcontext())  # the card has none
        pipeline = recipe.build().to(CARD)
        for stage in recipe.stages:
            modules, losses = stage.modules(pipeline), stage.prepare(pipeline, CARD, 2)
            for module in modules.values():
                module.requires_grad_(True)
            loop = Loop(stage.name, modules, stage.peak, folder / f"{stage.name}.pt", average=stage.average)

            def watched(step: int, losses: Any = losses, name: str = stage.name) -> Any:
                card.phase = name if step else "first step"
                return losses(step)

            loop.train(watched, Budget(steps=10), progress=False)
            card.phase = "between"
    return counts(card)


def run_scorer(name: str, checkpoint: Path) -> dict[str, Any]:
    """Score images on the CPU and on the card."""
    images, found = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    card = StandIn()
    for device in ("cpu", str(CARD)):
        inside: AbstractContextManager[Any] = nullcontext() if device == "cpu" else card
        with inside:
            scorer = load_scorer(name, str(checkpoint), device)
            card.events.clear()
            if isinstance(scorer, AttributeScorer):
                found.append(scorer.score(images, ["curly hair", "a smile"]))
            else:
                assert isinstance(scorer, DistanceScorer)
                found.append([(value,) for value in scorer.distance(images, images[:1]) if value is not None])
    difference = max(abs(a - b) for rows in zip(*found, strict=True) for a, b in zip(*rows, strict=True))
    return {"difference": difference, "scored": len(found[1]), **counts(card)}


def main() -> None:
    """Run every case and print the results by name."""

    def shapes(kind: str) -> Callable[[], SliderEditor]:
        return lambda: SliderEditor.from_pretrained("shapes-kontext", f"shapes-{kind}")

    def on_inductor() -> SliderEditor:
        """GST as an Inductor engine runs it: folded, in buffers of the engine's own."""
        editor = shapes("gst")()
        editor.engine = engine_for(editor.engine.backbone, max_batch=4)  # type: ignore[attr-defined]
        return editor

    def same(latents: Tensor) -> Tensor:
        return latents

    torch.compiler.set_stance("force_eager")  # the card has no compiler
    with tempfile.TemporaryDirectory() as folder:
        base = save_tiny_checkpoint(Path(folder) / "qwen")
        results = {
            "st": run_edit(shapes("st"), same, 2),
            "gst": run_edit(shapes("gst"), same, 1),
            "gst on inductor": run_edit(on_inductor, same, 1),
            "qwen": run_edit(lambda: SliderEditor.from_pretrained(base, qwen_adapter(base)), same, 2),
            "an item() in the loop": run_edit(shapes("st"), lambda x: x * (x.abs().max().item() > 0), 2),
            "a copy in each step": run_edit(shapes("st"), lambda x: x.cpu().to(CARD), 2),
            "latents on the CPU": run_edit(shapes("st"), lambda x: x.cpu(), 2),
            "service": run_service(),
            "train editor": run_editor_stages(Path(folder)),
            **{f"train {name}": run_training(make, Path(folder)) for name, make in TRAINERS.items()},
        }
        save_scorer_checkpoints(Path(folder))
        results |= {name: run_scorer(name, Path(folder) / name) for name in SCORERS_ON_CARD}
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
