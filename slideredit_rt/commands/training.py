"""`slideredit-rt train editor`, `adapter`, `concepts`, `offsets` and `few-step`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slideredit_rt.assets import base_of, choose_world, resolve_base
from slideredit_rt.commands.shared import (
    Commands,
    add_device_option,
    add_world_option,
    emit,
    listed,
    options_given,
    read_lines,
)
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.files import user_path
from slideredit_rt.settings import pick_device

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from slideredit_rt.families import Family
    from slideredit_rt.training.data import Data
    from slideredit_rt.training.trainer import Trainer
    from slideredit_rt.training.worlds import MakeData, TrainingWorld

_RECIPE = "(default: the recipe's)"
_SAMPLES = 4
_SHORTEST_SAMPLED = 20


def _train_editor(args: argparse.Namespace) -> int:
    from slideredit_rt.training.embedded.recipe import train_editor
    from slideredit_rt.training.worlds import TRAINING

    recipe = TRAINING[choose_world(args.world, [args.start])].editor()
    plan = recipe.plan(args.stages, dict(args.steps), args.minutes)
    device = pick_device(**options_given(args, "device"))
    start = None if args.start is None else resolve_base(args.start)
    report = train_editor(recipe, args.out, plan, device, start=start, overwrite=args.overwrite, progress=not args.quiet)
    lines = [f"{name}: {stage['steps']} steps in {stage['seconds']:.0f} s" for name, stage in report["stages"].items()]
    lines += [
        f"{key}: {row['mse']:.5f}, unedited {row['mse_unedited']:.5f}, ratio {row['ratio']:.4f}"
        for key, row in report.items()
        if key.startswith("instructions=")
    ]
    left = ", ".join(report["missing"])
    lines.append(f"kept the state in {args.out}.work; still to train: {left}" if left else f"wrote {args.out}")
    emit(args, {"out": str(args.out), **report}, lines)
    return 0


def _stage_steps(text: str) -> tuple[str, int]:
    """Parse `STAGE=N`."""
    name, _, number = text.partition("=")
    if not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a stage and its number of steps, such as editor=2800")
    return name, int(number)


def _frozen_base(args: argparse.Namespace, start: str | None = None) -> tuple[Family, Any, torch.device, TrainingWorld]:
    """Return the family and the pipeline of `--base`, the device to train on, and the recipes of the world.

    `start` is the adapter that training starts from, which has to be of the same world.
    """
    import torch

    from slideredit_rt.families import family_of
    from slideredit_rt.training.worlds import TRAINING

    device = pick_device(**options_given(args, "device"))
    world = choose_world(args.world, [args.base, start])
    folder = resolve_base(args.base or base_of(world))
    if args.base is None and not folder.exists():
        raise SliderEditError(
            f"the package has no {base_of(world)}; train one with 'train editor --world {world}' and give it as --base"
        )
    family = family_of(folder)
    return family, family.load_pipeline(folder, dtype=getattr(torch, args.dtype)), device, TRAINING[world]


def _training_data(args: argparse.Namespace, side: int, make: MakeData, device: torch.device) -> Data:
    """Return the images of `--images` with the edits of `--instructions`, or else examples of the world."""
    from slideredit_rt.training.data import FolderData

    edits = None if args.instructions is None else read_lines(args.instructions)
    if args.images is None:
        return make(edits, device)
    if edits is None:
        raise SliderEditError("--images needs --instructions as well; give a text file with one edit per line")
    images = sorted(p for p in args.images.iterdir() if p.is_file()) if args.images.is_dir() else []
    return FolderData(images, edits, side)


def _train(args: argparse.Namespace, make: Callable[[], Trainer[Any]]) -> Any:
    """Make a trainer and run it to the end; return what it trained."""
    import torch

    try:
        trainer = make()
        sample_every = default_sampling(trainer.settings.steps) if args.sample_every is None else args.sample_every
        return trainer.train(progress=not args.quiet, sample_every=sample_every, snapshots=args.snapshots)
    except torch.OutOfMemoryError:
        raise OutOfDeviceMemory(
            "the GPU is out of memory for this training; use --dtype bfloat16, --gradient-checkpointing or a smaller --batch"
        ) from None


def default_sampling(steps: int) -> int:
    """Return the steps between sample images: four per run, and none in runs that are too short to show progress."""
    return steps // _SAMPLES if steps >= _SHORTEST_SAMPLED else 0


def _train_adapter(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.adapters import load_adapter
    from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer

    family, pipeline, device, world = _frozen_base(args, args.start)
    data = _training_data(args, family.side(pipeline), world.data, device)
    target = "remaining" if args.kind == "st" else "neutral"
    recipe = world.adapter(args.kind) if args.images is None else SuppressionConfig(kind=args.kind, target=target)  # type: ignore[arg-type]
    start = None if args.start is None else load_adapter(args.start, family)
    given = options_given(args, *(f.name for f in dataclasses.fields(SuppressionConfig)))
    if start is not None:
        given = {"rank": start.rank} | given
    config = dataclasses.replace(recipe, **given)
    adapter = _train(args, lambda: SuppressionTrainer(family, pipeline, data, config, args.out, device, start=start))
    emit(args, {"out": str(args.out), "modules": len(adapter.pairs), **adapter.training}, [f"wrote {args.out}"])
    return 0


def _train_concepts(args: argparse.Namespace) -> int:
    from slideredit_rt.training.concepts import ConceptConfig, ConceptTrainer

    return _train_contrast(args, ConceptTrainer, ConceptConfig, "concepts")


def _train_offsets(args: argparse.Namespace) -> int:
    from slideredit_rt.training.attribute_offsets import OffsetConfig, OffsetTrainer

    return _train_contrast(args, OffsetTrainer, OffsetConfig, "offsets")


def _train_contrast(args: argparse.Namespace, trainer: Any, settings: Any, what: str) -> int:
    """Train one slider per instruction: with the shipped recipe on examples of the world, else with the trainer's defaults."""
    import dataclasses

    family, pipeline, device, world = _frozen_base(args)
    recipe = getattr(world, what)()
    data = _training_data(args, family.side(pipeline), world.balanced, device)
    given = options_given(args, *(f.name for f in dataclasses.fields(settings) if f.name != "attributes"))
    if args.instructions is not None:
        given["attributes"] = tuple(read_lines(args.instructions))
    config = dataclasses.replace(recipe, **given) if args.images is None else settings(**given)
    trained = _train(args, lambda: trainer(family, pipeline, data, config, args.out, device))
    emit(args, {"out": str(args.out), **trained.training}, [f"wrote {args.out}: {len(config.attributes)} attributes"])
    return 0


def _train_few_step(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.training.few_step import FewStepConfig, FewStepTrainer

    family, pipeline, device, world = _frozen_base(args)
    data = _training_data(args, family.side(pipeline), world.data, device)
    recipe = world.few_step() if args.images is None else FewStepConfig()
    names = (f.name for f in dataclasses.fields(FewStepConfig) if f.name != "timestep_sampling")
    config = dataclasses.replace(recipe, **options_given(args, *names))
    lora = _train(args, lambda: FewStepTrainer(family, pipeline, data, config, args.out, device))
    # The guided trajectory is distilled into one pass, so guiding it again would be wrong.
    unguided = " --default-true-cfg-scale 1" if family.default_true_cfg_scale(pipeline) > 1 else ""
    lines = [f"wrote {args.out}", f"use it with build --fuse {args.out} --default-steps {config.few_steps}{unguided}"]
    emit(args, {"out": str(args.out), "modules": len(lora.pairs), **lora.training}, lines)
    return 0


def _add_timestep_option(sub: argparse.ArgumentParser) -> None:
    """Add the option of trainers that draw noise levels."""
    sub.add_argument("--timestep-sampling", choices=("uniform", "logit-normal"), help=f"distribution of timesteps {_RECIPE}")


def _add_training_options(sub: argparse.ArgumentParser) -> None:
    """Add the options that every trainer over a frozen base has."""
    sub.add_argument(
        "--base",
        help="base: an embedded name such as portraits-kontext, a diffusers folder or a hub repository (default: the world's)",
    )
    add_world_option(sub, "examples and recipe without --images", follows="the base")
    sub.add_argument(
        "--images", type=user_path, help="folder of source images (default: examples of the world, with the shipped recipe)"
    )
    sub.add_argument("--instructions", type=user_path, help="text file, one edit per line (default: all edits of the world)")
    sub.add_argument("--steps", type=int, help=f"optimizer steps {_RECIPE}")
    sub.add_argument("--batch", type=int, help=f"examples per step {_RECIPE}")
    sub.add_argument("--learning-rate", type=float, help=f"learning rate {_RECIPE}")
    sub.add_argument("--schedule", choices=("constant", "cosine"), help=f"learning rate schedule {_RECIPE}")
    sub.add_argument("--seed", type=int, help=f"seed of data, noise and initial weights {_RECIPE}")
    sub.add_argument("--gradient-checkpointing", action="store_const", const=True, help="save memory at the cost of time")
    add_device_option(sub, "the base and of what is trained")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the frozen base (default: %(default)s)"
    )
    sub.add_argument(
        "--sample-every",
        type=int,
        help=f"steps between sample images; 0 draws none (default: a quarter of the run, none below {_SHORTEST_SAMPLED} steps)",
    )
    sub.add_argument(
        "--snapshots",
        type=listed(int),
        default=[],
        metavar="STEP,…",
        help="steps after which to save an intermediate result (default: none)",
    )
    sub.add_argument("--out", type=user_path, required=True, help="file to write (.safetensors)")


def _add_adapter(kinds: Commands) -> None:
    adapter = kinds.add("adapter", _train_adapter, "train an ST or GST adapter by partial prompt suppression")
    _add_training_options(adapter)
    _add_timestep_option(adapter)
    adapter.add_argument(
        "--kind",
        choices=("st", "gst"),
        required=True,
        help="st: a slider scales its own words; gst: one slider scales everything",
    )
    adapter.add_argument(
        "--from",
        dest="start",
        metavar="ADAPTER",
        help="trained adapter to start from, which gives the rank (default: an adapter that changes nothing)",
    )
    adapter.add_argument(
        "--target",
        choices=("remaining", "empty", "neutral"),
        help="prompt of the frozen model (default: remaining for st, neutral for gst)",
    )
    adapter.add_argument(
        "--alpha-sampling",
        choices=("uniform", "fixed"),
        help="alpha in training: fixed at 1 as in the paper, or uniform for a gradual slider (default: uniform)",
    )
    adapter.add_argument("--rank", type=int, help=f"LoRA rank {_RECIPE}")
    adapter.add_argument(
        "--all-projections",
        action="store_const",
        const=True,
        help="adapt every linear whose rows the kind can scale, for st also those of the text rows among joint rows "
        "(default: only those of the released adapters)",
    )


def _add_rivals(kinds: Commands) -> None:
    """Add the trainers of other methods' sliders."""
    concepts = kinds.add("concepts", _train_concepts, "train Concept Sliders, a bank with one LoRA per instruction")
    _add_training_options(concepts)
    _add_timestep_option(concepts)
    concepts.add_argument("--rank", type=int, help=f"LoRA rank of each member {_RECIPE}")
    concepts.add_argument(
        "--eta", type=float, help="distance of the target, in steps from the neutral prompt to the instruction (default: 2)"
    )

    offsets = kinds.add("offsets", _train_offsets, "train an embedding offset per instruction")
    _add_training_options(offsets)
    _add_timestep_option(offsets)
    offsets.add_argument("--noun", help="words of the neutral prompt that get the offset (default: image)")


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    kinds = commands.group("train", "train the embedded editor, an adapter, a few-step LoRA, or another method's sliders")
    editor = kinds.add("editor", _train_editor, "train an embedded editor from scratch")
    add_world_option(editor, "editor", follows="--from")
    editor.add_argument("--out", type=user_path, required=True, help="pipeline folder to write; states are kept in OUT.work")
    editor.add_argument(
        "--steps", type=listed(_stage_steps), default=[], metavar="STAGE=N,…", help=f"optimizer steps of stages {_RECIPE}"
    )
    editor.add_argument("--minutes", type=float, help="time of all stages together, instead of their steps")
    editor.add_argument(
        "--stages", type=listed(str), default=[], metavar="STAGE,…", help="stages to train now (default: all of the recipe)"
    )
    editor.add_argument(
        "--from",
        dest="start",
        metavar="BASE",
        help="trained editor of the same world to start from (default: random weights)",
    )
    add_device_option(editor, "training")
    editor.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")

    _add_adapter(kinds)
    _add_rivals(kinds)

    few_step = kinds.add("few-step", _train_few_step, "train a LoRA that makes few steps do what many do, for build --fuse")
    _add_training_options(few_step)
    few_step.add_argument("--few-steps", type=int, help=f"denoising steps of an edit with the LoRA {_RECIPE}")
    few_step.add_argument("--substeps", type=int, help=f"steps of the frozen base within each of them {_RECIPE}")
    few_step.add_argument("--rank", type=int, help=f"LoRA rank {_RECIPE}")
