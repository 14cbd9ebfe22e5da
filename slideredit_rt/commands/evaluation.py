"""`slideredit-rt evaluate`."""

from __future__ import annotations

import argparse

from slideredit_rt.assets import base_of, choose_world
from slideredit_rt.commands.shared import (
    Commands,
    add_own_image_options,
    add_run_options,
    add_world_option,
    emit,
    listed,
    options_given,
    own_image_options,
    read_lines,
    run_settings,
)
from slideredit_rt.files import check_engine_folder, user_path


def _evaluate(args: argparse.Namespace) -> int:
    for engine in args.engine:
        check_engine_folder(engine)
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.evaluation.evaluate import run_evaluation
    from slideredit_rt.evaluation.report import markdown_table
    from slideredit_rt.evaluation.run import BenchmarkConfig
    from slideredit_rt.evaluation.setup import Setup

    # Ahead of everything that is loaded: these refuse devices that do not exist.
    run, own_images = run_settings(args), own_image_options(args)
    config = BenchmarkConfig(
        sliders=tuple(args.sliders),
        scenes=tuple(args.scenes),
        **options_given(args, "samples", "joint_samples", "search_scenes", "steps"),
    )
    base = args.base or (read_manifest(args.engine[0]).base["source"] if args.engine else None)
    world = choose_world(args.world, [base, *args.adapter, args.concepts, args.offsets])
    report = run_evaluation(
        Setup(
            base=base or base_of(world),
            out=args.out,
            adapters=args.adapter,
            engines=args.engine,
            run=run,
            concepts=args.concepts,
            offsets=args.offsets,
        ),
        config,
        systems=args.systems,
        own_images=own_images,
        instructions=args.instructions and read_lines(args.instructions),
        world=world,
        progress=not args.quiet,
    )
    files = ", ".join(("report.json", "table.md", "rows.csv", *report["pictures"]))
    emit(args, report, [markdown_table(report["systems"]), f"wrote {args.out}: {files}"])
    return 0


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    evaluate = commands.add("evaluate", _evaluate, "compare sliders with other ways to scale an edit")
    evaluate.add_argument("--base", help="base to evaluate (default: that of the first engine, else the world's editor)")
    add_world_option(evaluate, "scenes to edit", follows="the base or adapter")
    evaluate.add_argument(
        "--adapter", action="append", default=[], help="adapter: portraits-st, portraits-gst, a file or a folder; repeatable"
    )
    evaluate.add_argument("--engine", type=user_path, action="append", default=[], help="engine folder; repeatable")
    evaluate.add_argument(
        "--systems",
        type=listed(str),
        default=[],
        help="systems to compare, such as st,explicit-cfg (default: all that can run; an unknown name lists them)",
    )
    evaluate.add_argument(
        "--concepts", help="bank of concept sliders (default: the embedded one of the world, on its own base and scenes)"
    )
    evaluate.add_argument(
        "--offsets", help="attribute offsets (default: the embedded ones of the world, on their own base and scenes)"
    )
    evaluate.add_argument(
        "--sliders", type=listed(int), default="1", help="numbers of sliders to move jointly, out of 1, 2 and 3 (default: 1)"
    )
    evaluate.add_argument(
        "--scenes", type=listed(int), default="64", help="cases for each number of sliders, or one number for all (default: 64)"
    )
    evaluate.add_argument("--samples", type=int, help="settings of a slider moved alone (default: 15)")
    evaluate.add_argument("--joint-samples", type=int, help="settings per slider when several are moved (default: 7)")
    evaluate.add_argument("--search-scenes", type=int, help="scenes for finding each system's range (default: 12)")
    evaluate.add_argument("--steps", type=int, help="denoising steps (default: 12)")
    add_run_options(evaluate)
    evaluate.add_argument(
        "--instructions", type=user_path, help="text file with the edits of the scenes, one per line (default: all)"
    )
    add_own_image_options(evaluate, distances=True)
    evaluate.add_argument("--out", type=user_path, required=True, help="folder to write; an interrupted run continues in it")
