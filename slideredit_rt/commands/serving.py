"""`slideredit-rt serve`, `bench serve` and `export-triton`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from slideredit_rt.commands.shared import Commands, add_runtime_options, emit, options_given, runtime_options
from slideredit_rt.files import user_path
from slideredit_rt.serving.command import add_options as add_serve_options


def _serve(args: argparse.Namespace) -> int:
    from slideredit_rt.serving.command import serve

    return serve(args, runtime_options(args))


def _export_triton(args: argparse.Namespace) -> int:
    from slideredit_rt.export.inference_server import export_triton

    result = export_triton(args.engine, args.out, overwrite=args.overwrite, **options_given(args, "name", "max_queue_delay_us"))
    batching = f"batches up to {result['max_batch_size']}" if result["max_batch_size"] else "no batching, max_batch_size 0"
    emit(args, result, [f"wrote {result['model']} ({result['platform']}; {batching})"])
    return 0


def _bench_serve(args: argparse.Namespace) -> int:
    from slideredit_rt.bench.serve import Load, bench_serve, default_file, table
    from slideredit_rt.files import atomic_file

    names = ("num_prompts", "request_rate", "max_concurrency", "num_warmups", "sliders", "preview_share", "steps", "seed")
    given = options_given(args, *names, "picture")
    if args.instruction:
        given["instructions"] = tuple(args.instruction)
    result = bench_serve(
        Load(**given), base_url=args.base_url, engine=args.engine, api_key=os.environ.get("SLIDEREDIT_API_KEY")
    )
    lines = table(result)
    if args.save_result:
        file = args.result_dir / (args.result_filename or default_file(result))
        with atomic_file(file) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
        lines.append(f"wrote {file}")
    emit(args, result, lines)
    return 1 if result["failed"] else 0


def _add_bench_options(sub: argparse.ArgumentParser) -> None:
    place = sub.add_mutually_exclusive_group()
    place.add_argument("--base-url", help="of a running server, whose key is in $SLIDEREDIT_API_KEY (default: one is started)")
    place.add_argument("--engine", type=user_path, help="of the server that is started (default: the embedded one)")
    sub.add_argument("--num-prompts", type=int, metavar="N", help="requests to measure (default: 64)")
    sub.add_argument("--request-rate", type=float, metavar="RATE", help="per second, at random times (default: inf, at once)")
    sub.add_argument("--max-concurrency", type=int, metavar="N", help="most requests under way at a time (default: no limit)")
    sub.add_argument("--num-warmups", type=int, metavar="N", help="requests before, not measured (default: 4)")
    sub.add_argument("--sliders", choices=("mixed", "equal"), help="drawn for each request, or the same (default: mixed)")
    sub.add_argument("--preview-share", type=float, metavar="SHARE", help="of requests that are previews (default: 0)")
    sub.add_argument("--steps", type=int, help="denoising steps (default: the server's)")
    sub.add_argument("--picture", type=user_path, help="to edit (default: scenes of the shapes world)")
    sub.add_argument("--instruction", action="append", help="of the prompt; repeat (default: two of the shapes world)")
    sub.add_argument("--seed", type=int, help="of strengths, noise and times (default: 0)")
    sub.add_argument("--save-result", action="store_true", help="write the result as JSON")
    sub.add_argument("--result-dir", type=user_path, default=Path(), help="(default: here)")
    sub.add_argument("--result-filename", metavar="NAME", help="(default: from rate, concurrency and time)")


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    serve = commands.add("serve", _serve, "serve edits over HTTP, with a page")
    add_serve_options(serve)
    add_runtime_options(serve)

    bench = commands.group("bench", "measure a server")
    _add_bench_options(bench.add("serve", _bench_serve, "send edits to a server and measure latency and throughput"))

    triton = commands.add("export-triton", _export_triton, "write an engine as a model of NVIDIA Triton Inference Server")
    triton.add_argument("engine", type=user_path, metavar="ENGINE", help="built for onnxruntime or tensorrt")
    triton.add_argument("--out", type=user_path, required=True, help="model repository; other models in it stay")
    triton.add_argument("--name", help="of the model (default: slider_backbone)")
    triton.add_argument(
        "--max-queue-delay-us", type=int, metavar="N", help="how long a request may wait for others to join it (default: 0)"
    )
    triton.add_argument("--overwrite", action="store_true", help="replace a model of that name")
