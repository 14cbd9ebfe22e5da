"""`slideredit-rt serve` and `export-triton`."""

from __future__ import annotations

import argparse
from pathlib import Path

from slideredit_rt.commands.shared import Commands, add_runtime_options, emit, options_given, runtime_options
from slideredit_rt.serving.command import add_options as add_serve_options


def _serve(args: argparse.Namespace) -> int:
    from slideredit_rt.serving.command import serve

    return serve(args, runtime_options(args))


def _export_triton(args: argparse.Namespace) -> int:
    from slideredit_rt.export.triton_repository import export_triton

    result = export_triton(args.engine, args.out, overwrite=args.overwrite, **options_given(args, "name", "max_queue_delay_us"))
    batching = f"batches up to {result['max_batch_size']}" if result["max_batch_size"] else "no batching, max_batch_size 0"
    emit(args, result, [f"wrote {result['model']} ({result['platform']}; {batching})"])
    return 0


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    serve = commands.add("serve", _serve, "serve edits over HTTP, with a page")
    add_serve_options(serve)
    add_runtime_options(serve)

    triton = commands.add("export-triton", _export_triton, "write an engine as a model of NVIDIA Triton Inference Server")
    triton.add_argument("engine", type=Path, metavar="ENGINE", help="built for onnxruntime or tensorrt")
    triton.add_argument("--out", type=Path, required=True, help="model repository; other models in it stay")
    triton.add_argument("--name", help="of the model (default: slider_backbone)")
    triton.add_argument(
        "--max-queue-delay-us", type=int, metavar="N", help="how long a request may wait for others to join it (default: 0)"
    )
    triton.add_argument("--overwrite", action="store_true", help="replace a model of that name")
