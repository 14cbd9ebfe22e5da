"""A recipe of an embedded editor: its stages, and the run that trains them and writes the pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from torch import nn

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import get_family
from slideredit_rt.files import atomic_folder
from slideredit_rt.training.checkpoint import load_checkpoint
from slideredit_rt.training.embedded.loop import Budget, Loop, Losses

_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")

Evaluate = Callable[[FluxKontextPipeline, Path], dict[str, Any]]
"""Evaluation of a pipeline, which may write files into the folder that it is given."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: Name of the stage.
        modules: Modules that it trains, by name.
        prepare: Losses of its steps, for a pipeline, its device and a batch size.
        steps: Default number of steps.
        batch: Batch size by type of device.
        peak: Peak learning rate.
        share: Share of a time budget for all stages.
        needs: Stages that must be finished before.
        average: Keep the average of the weights instead of the last ones.
    """

    name: str
    modules: Callable[[FluxKontextPipeline], Mapping[str, nn.Module]]
    prepare: Callable[[FluxKontextPipeline, torch.device, int], Callable[[int], Losses]]
    steps: int
    batch: Mapping[str, int]
    peak: float
    share: float
    needs: tuple[str, ...] = ()
    average: bool = False


@dataclass(frozen=True)
class EditorRecipe:
    """Recipe of an embedded editor.

    Attributes:
        name: Name of the base that it makes.
        build: Untrained pipeline.
        stages: Stages, in order. Batch sizes are known for the types of device that it runs on.
        evaluate: Evaluation of the result.
        storage: Dtype on disk of parts of the pipeline; float32 for the others. An engine has the transformer's dtype unless
            its build sets one.
    """

    name: str
    build: Callable[[], FluxKontextPipeline]
    stages: tuple[Stage, ...]
    evaluate: Evaluate
    storage: Mapping[str, torch.dtype] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        """Return the stage with this name.

        Raises:
            SliderEditError: There is none.
        """
        found = next((stage for stage in self.stages if stage.name == name), None)
        if found is None:
            known = ", ".join(stage.name for stage in self.stages)
            raise SliderEditError(f"{name!r} is not a stage of {self.name}; choose from {known}")
        return found

    def plan(
        self, stages: Sequence[str] = (), steps: Mapping[str, int] | None = None, minutes: float | None = None
    ) -> dict[str, Budget]:
        """Return the budget of each stage to train.

        Args:
            stages: Stages to train; all if empty.
            steps: Number of steps by stage; the others have the recipe's.
            minutes: Time of all these stages together, divided by their shares.

        Raises:
            SliderEditError: A name is not a stage, or both steps and minutes are given.
        """
        chosen = [self.stage(name) for name in dict.fromkeys(stages)] or list(self.stages)
        given = {self.stage(name).name: number for name, number in (steps or {}).items()}
        if minutes is None:
            return {stage.name: Budget(steps=given.get(stage.name, stage.steps)) for stage in chosen}
        if given:
            raise SliderEditError("steps and minutes cannot be combined; pass one of them")
        whole = sum(stage.share for stage in chosen)
        return {stage.name: Budget(seconds=60 * minutes * stage.share / whole) for stage in chosen}


@contextmanager
def fast_arithmetic(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply float32 matrices in TF32 and choose the fastest convolutions.

    What the blocks of the transformer multiply is in bfloat16 (see `slideredit_rt.training.embedded.flow.bfloat16_blocks`).
    """
    if device.type != "cuda":
        yield
        return
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark


def _load_weights(pipeline: FluxKontextPipeline, folder: Path) -> None:
    """Copy the weights of a trained pipeline and take its tokenizers, whose training is not repeatable.

    Raises:
        SliderEditError: The folder has no pipeline of the recipe's sizes.
    """
    trained = get_family("flux_kontext").load_pipeline(folder)
    try:
        for part in _PARTS:
            getattr(pipeline, part).load_state_dict(getattr(trained, part).state_dict())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise SliderEditError(f"the editor in {str(folder)!r} has other sizes ({reason}); leave --from out") from None
    pipeline.register_modules(tokenizer=trained.tokenizer, tokenizer_2=trained.tokenizer_2)


def _loop(recipe: EditorRecipe, stage: Stage, pipeline: FluxKontextPipeline, work: Path) -> Loop:
    """Return the loop of a stage, with its saved state. Only the modules of the stage can be trained."""
    for part in _PARTS:
        getattr(pipeline, part).requires_grad_(False).eval()
    modules = stage.modules(pipeline)
    for module in modules.values():
        module.requires_grad_(True).train()
    return Loop(stage.name, modules, stage.peak, work / f"{stage.name}.pt", average=stage.average)


def train_stages(
    recipe: EditorRecipe,
    work: Path,
    plan: Mapping[str, Budget],
    device: torch.device,
    *,
    start: Path | None = None,
    progress: bool = True,
) -> FluxKontextPipeline:
    """Train the stages of a plan, and return the pipeline with the states of all stages, frozen.

    Args:
        recipe: Recipe.
        work: Folder of the states.
        plan: Budget of each stage to train.
        device: Device to train on.
        start: Folder of a trained pipeline to start from. Stages that are not in the plan then keep its weights, whatever
            states there are. None starts from scratch.
        progress: Show progress bars on standard error.

    Raises:
        SliderEditError: A stage needs another one that is not finished, the recipe does not run on the device, or `start`
            does not fit the recipe.
    """
    pipeline = recipe.build()
    if start is not None:
        _load_weights(pipeline, start)
    pipeline.to(device)
    with fast_arithmetic(device):
        for stage in recipe.stages:
            if stage.name not in plan:
                if start is None:
                    _loop(recipe, stage, pipeline, work)
                continue
            if device.type not in stage.batch:
                raise SliderEditError(
                    f"{recipe.name} trains on {' or '.join(stage.batch)}, not on {device.type}; pass --device"
                )
            if start is None and (waiting := sorted(set(stage.needs) - set(finished_stages(recipe, work)))):
                raise SliderEditError(f"stage {stage.name!r} needs {waiting[0]!r}, which is not finished; train it first")
            losses = stage.prepare(pipeline, device, stage.batch[device.type])
            _loop(recipe, stage, pipeline, work).train(losses, plan[stage.name], progress=progress)
    for stage in recipe.stages if start is None else ():
        # Another process may have finished other stages in the meantime.
        _loop(recipe, stage, pipeline, work)
    for part in _PARTS:
        getattr(pipeline, part).requires_grad_(False).eval()
    return pipeline


def finished_stages(recipe: EditorRecipe, work: Path) -> dict[str, dict[str, Any]]:
    """Return the length of each finished stage and its last errors, by the states in the folder `work`."""
    found = {}
    for stage in recipe.stages:
        state = load_checkpoint(work / f"{stage.name}.pt")
        if state is not None and state["finished"]:
            numbers = {"steps": state["step"], "seconds": round(state["seconds"], 1)}
            found[stage.name] = numbers | {"error": state["errors"][-1][1] if state["errors"] else None}
    return found


def train_editor(
    recipe: EditorRecipe,
    out: Path,
    plan: Mapping[str, Budget],
    device: torch.device,
    *,
    start: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the stages of a plan. If all stages of the recipe are finished then, write and evaluate the pipeline.

    Args:
        recipe: Recipe.
        out: Folder of the pipeline. States are kept in `OUT.work`, from which an interrupted run continues, and sample images
            in `OUT.samples`.
        plan: Budget of each stage to train.
        device: Device to train and evaluate on.
        start: Folder of a trained pipeline to start from (see `train_stages`); None starts from scratch.
        overwrite: Replace `out` if it exists.
        progress: Show progress bars on standard error.

    Returns:
        The finished stages, the names of the `missing` ones and, if there are none, the evaluation, which is also written to
        `evaluation.json` in the folder.

    Raises:
        SliderEditError: The folder exists, or see `train_stages`.
    """
    if out.exists() and not overwrite:
        raise SliderEditError(f"{str(out)!r} exists already; choose another name or pass --overwrite")
    work = out.with_name(f"{out.name}.work")
    pipeline = train_stages(recipe, work, plan, device, start=start, progress=progress)
    finished = {name: row for name, row in finished_stages(recipe, work).items() if start is None or name in plan}
    missing = [s.name for s in recipe.stages if s.name not in finished] if start is None else []
    report: dict[str, Any] = {"stages": finished, "missing": missing}
    if start is not None:
        report["started_from"] = start.name
    if report["missing"]:
        return report
    with atomic_folder(out, overwrite=overwrite) as temporary:
        pipeline.to("cpu")
        for part, dtype in recipe.storage.items():
            getattr(pipeline, part).to(dtype)
        pipeline.save_pretrained(temporary)
        stored = get_family("flux_kontext").load_pipeline(temporary).to(device)
        with fast_arithmetic(device):
            report |= recipe.evaluate(stored, out.with_name(f"{out.name}.samples"))
        (temporary / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    return report
