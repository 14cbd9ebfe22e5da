"""`slideredit-rt train shapes-editor`, `adapter`, `concepts` and `offsets`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slideredit_rt.commands.shared import Commands, emit, listed, options_given, read_lines
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import user_path

if TYPE_CHECKING:
    from slideredit_rt.families import Family
    from slideredit_rt.training.data import Data
    from slideredit_rt.training.trainer import Trainer


def _train_editor(args: argparse.Namespace) -> int:
    from slideredit_rt.shapes.editor_recipe import train_shapes_editor

    report = train_shapes_editor(args.out, args.vae_steps, args.decoder_steps, args.editor_steps)
    lines = [
        f"{k}: {v['mse']:.5f}, unedited {v['mse_unedited']:.5f}, ratio {v['ratio']:.4f}"
        for k, v in report.items()
        if isinstance(v, dict)
    ]
    emit(args, {"out": str(args.out), **report}, [*lines, f"wrote {args.out}"])
    return 0


def _frozen_base(args: argparse.Namespace) -> tuple[Family, Any]:
    """The family and the pipeline that a trainer works on."""
    import torch

    from slideredit_rt.assets import resolve_base
    from slideredit_rt.families import family_of

    folder = resolve_base(args.base)
    family = family_of(folder)
    return family, family.load_pipeline(folder, dtype=getattr(torch, args.dtype))


def _training_data(args: argparse.Namespace, side: int, shapes: type[Data]) -> Data:
    """Images of `--images` with the edits of `--instructions`, else shapes scenes."""
    from slideredit_rt.shapes.world import find_instruction
    from slideredit_rt.training.data import FolderData

    edits = None if args.instructions is None else read_lines(args.instructions)
    if args.images is None:
        return shapes() if edits is None else shapes([find_instruction(edit) for edit in edits])  # type: ignore[call-arg]
    if edits is None:
        raise SliderEditError("training on a folder of images needs --instructions, a text file with one edit per line")
    images = sorted(p for p in args.images.iterdir() if p.is_file()) if args.images.is_dir() else []
    return FolderData(images, edits, side)


def _train(args: argparse.Namespace, trainer: Trainer[Any]) -> Any:
    """Run to the end; returns what was trained."""
    sample_every = max(1, trainer.settings.steps // 4) if args.sample_every is None else args.sample_every
    return trainer.train(progress=not args.quiet, sample_every=sample_every, snapshots=args.snapshots)


def _train_adapter(args: argparse.Namespace) -> int:
    import dataclasses

    from slideredit_rt.shapes.adapter_recipes import ShapesData, adapter_recipe
    from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer

    family, pipeline = _frozen_base(args)
    data = _training_data(args, family.side(pipeline), ShapesData)
    target = "remaining" if args.kind == "st" else "neutral"
    recipe = adapter_recipe(args.kind) if args.images is None else SuppressionConfig(kind=args.kind, target=target)  # type: ignore[arg-type]
    config = dataclasses.replace(recipe, **options_given(args, *(f.name for f in dataclasses.fields(SuppressionConfig))))
    adapter = _train(args, SuppressionTrainer(family, pipeline, data, config, args.out))
    emit(args, {"out": str(args.out), "modules": len(adapter.pairs), **adapter.training}, [f"wrote {args.out}"])
    return 0


def _train_concepts(args: argparse.Namespace) -> int:
    from slideredit_rt.shapes.adapter_recipes import concepts_recipe
    from slideredit_rt.training.concepts import ConceptConfig, ConceptTrainer

    return _train_contrast(args, ConceptTrainer, ConceptConfig, concepts_recipe())


def _train_offsets(args: argparse.Namespace) -> int:
    from slideredit_rt.shapes.adapter_recipes import offsets_recipe
    from slideredit_rt.training.attribute_offsets import OffsetConfig, OffsetTrainer

    return _train_contrast(args, OffsetTrainer, OffsetConfig, offsets_recipe())


def _train_contrast(args: argparse.Namespace, trainer: Any, settings: Any, recipe: Any) -> int:
    """A trainer of one slider per instruction, by its own settings, or on shapes scenes by the shipped recipe."""
    import dataclasses

    from slideredit_rt.shapes.adapter_recipes import BalancedShapes

    family, pipeline = _frozen_base(args)
    data = _training_data(args, family.side(pipeline), BalancedShapes)
    given = options_given(args, *(f.name for f in dataclasses.fields(settings) if f.name != "attributes"))
    if args.instructions is not None:
        given["attributes"] = tuple(read_lines(args.instructions))
    config = dataclasses.replace(recipe, **given) if args.images is None else settings(**given)
    trained = _train(args, trainer(family, pipeline, data, config, args.out))
    emit(args, {"out": str(args.out), **trained.training}, [f"wrote {args.out}: {len(config.attributes)} attributes"])
    return 0


def _add_training_options(sub: argparse.ArgumentParser) -> None:
    """Options of every trainer of sliders."""
    sub.add_argument("--base", default="shapes-kontext", help="shapes-kontext, a diffusers folder or a hub repository")
    sub.add_argument("--images", type=user_path, help="folder of source images (default: shapes scenes and the shipped recipe)")
    sub.add_argument("--instructions", type=user_path, help="text file, one edit per line (default: all of the shapes world)")
    sub.add_argument("--timestep-sampling", choices=("uniform", "logit-normal"))
    sub.add_argument("--steps", type=int)
    sub.add_argument("--batch", type=int)
    sub.add_argument("--learning-rate", type=float)
    sub.add_argument("--schedule", choices=("constant", "cosine"))
    sub.add_argument("--seed", type=int)
    sub.add_argument("--gradient-checkpointing", action="store_const", const=True, help="less memory, more time")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen base")
    sub.add_argument("--sample-every", type=int, help="steps between sample images (default: a quarter of the run; 0: none)")
    sub.add_argument(
        "--snapshots", type=listed(int), default=[], metavar="STEP,…", help="keep what is trained after these steps, too"
    )
    sub.add_argument("--out", type=user_path, required=True, help="file to write (.safetensors)")


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    kinds = commands.group("train", "train an editor, an adapter, or a rival's sliders")
    editor = kinds.add("shapes-editor", _train_editor, "reproduce the embedded editor, shapes-kontext")
    editor.add_argument("--out", type=user_path, required=True, help="pipeline folder to write")
    editor.add_argument("--vae-steps", type=int, default=1600)
    editor.add_argument("--decoder-steps", type=int, default=800)
    editor.add_argument("--editor-steps", type=int, default=2800)

    adapter = kinds.add("adapter", _train_adapter, "train an ST or GST adapter by partial prompt suppression")
    _add_training_options(adapter)
    adapter.add_argument("--kind", choices=("st", "gst"), required=True)
    adapter.add_argument("--target", choices=("remaining", "empty", "neutral"), help="prompt of the frozen model")
    adapter.add_argument(
        "--alpha-sampling", choices=("uniform", "fixed"), help="fixed is the paper's loss; uniform makes a ramp"
    )
    adapter.add_argument("--rank", type=int)
    adapter.add_argument(
        "--all-projections",
        action="store_const",
        const=True,
        help="adapt every linear whose rows the kind may scale (default: those of the released adapters)",
    )

    concepts = kinds.add("concepts", _train_concepts, "train Concept Sliders, a bank with one LoRA per instruction")
    _add_training_options(concepts)
    concepts.add_argument("--rank", type=int, help="of each member")
    concepts.add_argument("--eta", type=float, help="steps from the neutral prompt to the instruction that a target goes")

    offsets = kinds.add("offsets", _train_offsets, "train an embedding offset per instruction")
    _add_training_options(offsets)
    offsets.add_argument("--noun", help="words of the base's neutral prompt that get the offset (default: image)")
