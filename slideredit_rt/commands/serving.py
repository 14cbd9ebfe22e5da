"""`slideredit-rt serve`, `bench serve` and `export-triton`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from slideredit_rt.commands.shared import (
    Commands,
    add_run_options,
    emit,
    options_given,
    runtime_options,
)
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import check_engine_folder, user_path
from slideredit_rt.serving.settings import KEY_VARIABLE, ServeSettings


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `serve_settings` reads."""
    defaults = ServeSettings()
    parser.add_argument(
        "engine",
        type=user_path,
        nargs="?",
        metavar="ENGINE",
        help="engine folder, written by slideredit-rt build (default: the embedded engine)",
    )
    parser.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s, this machine only)")
    parser.add_argument(
        "--port", type=int, default=defaults.port, help="port to listen on; 0 picks a free one (default: %(default)s)"
    )
    parser.add_argument("--model", help="model name for clients (default: the name of the engine folder)")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key-file", type=user_path, metavar="FILE", help=f"file with the API key (default: ${KEY_VARIABLE})")
    key.add_argument("--api-key", metavar="KEY", help="API key; visible to other users of this machine in the process list")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name of the server to accept, besides IP addresses, localhost, --host and this machine's name; * accepts "
        "any, as an API key does; repeatable",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose web pages may use the server, such as https://example.com; * allows all; repeatable",
    )
    parser.add_argument("--base", help="base checkpoint (default: the location in the manifest)")
    add_run_options(parser)
    _add_limits(parser, defaults)
    _add_memory_options(parser, defaults)
    _add_preview_options(parser, defaults)
    _add_ray_options(parser, defaults)


def _add_limits(parser: argparse.ArgumentParser, defaults: ServeSettings) -> None:
    parser.add_argument(
        "--max-queue", type=int, default=defaults.max_queue, help="images that may wait; 429 beyond it (default: %(default)s)"
    )
    parser.add_argument("--max-batch", type=int, help="most images in an engine step (default: the engine's)")
    parser.add_argument(
        "--no-step-batching", dest="step_batching", action="store_false", help="run one edit after the other, for comparisons"
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=defaults.max_megapixels,
        help="largest accepted image, in megapixels (default: %(default)g)",
    )
    parser.add_argument(
        "--max-body-mib", type=float, default=defaults.max_body_mib, help="largest request body, in MiB (default: %(default)g)"
    )
    parser.add_argument(
        "--request-seconds",
        type=float,
        default=defaults.request_seconds,
        help="time limit of an edit, in seconds; 504 beyond it (default: %(default)g)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=defaults.drain_seconds,
        help="time for accepted edits to finish on shutdown, in seconds (default: %(default)g)",
    )


def _add_memory_options(parser: argparse.ArgumentParser, defaults: ServeSettings) -> None:
    parser.add_argument(
        "--cache-mib",
        type=int,
        help="memory for encoded images, prompts and latents, in MiB (default: 256, and the keys and values of an image in "
        "addition for an engine that reads source images once)",
    )
    parser.add_argument(
        "--no-latent-cache",
        dest="latent_cache",
        action="store_false",
        help="keep no latents: repeat the first steps of a moved slider and edits that were made before",
    )
    parser.add_argument(
        "--adapters",
        type=user_path,
        metavar="DIR",
        help="folder of adapters that requests choose by name, for an engine with adapter inputs (default: the engine's own)",
    )
    parser.add_argument(
        "--adapters-mib",
        type=int,
        default=defaults.adapters_mib,
        help="device memory for these adapters, in MiB (default: %(default)s)",
    )


def _add_preview_options(parser: argparse.ArgumentParser, defaults: ServeSettings) -> None:
    parser.add_argument(
        "--preview-steps",
        type=int,
        default=defaults.preview_steps,
        help="denoising steps of previews that do not set num_inference_steps (default: %(default)s)",
    )
    parser.add_argument(
        "--preview-decoder",
        metavar="FOLDER",
        help="tiny autoencoder (diffusers' AutoencoderTiny), or its hub repository, that decodes previews and partial images "
        "(default: the base's autoencoder)",
    )


def _add_ray_options(parser: argparse.ArgumentParser, defaults: ServeSettings) -> None:
    ray = parser.add_argument_group("several processes or machines (pip install 'slideredit-rt[ray]')")
    ray.add_argument("--ray", action="store_true", help="serve with Ray Serve, on the cluster at $RAY_ADDRESS or a local one")
    ray.add_argument(
        "--min-replicas", type=int, default=defaults.min_replicas, help="engines that always run (default: %(default)s)"
    )
    ray.add_argument("--max-replicas", type=int, help="most engines while the queue is long (default: as --min-replicas)")
    ray.add_argument(
        "--replica-cpus",
        type=float,
        default=defaults.replica_cpus,
        help="CPUs that Ray reserves per replica (default: %(default)g)",
    )
    ray.add_argument(
        "--replica-gpus",
        type=float,
        default=defaults.replica_gpus,
        help="GPUs that Ray reserves per replica (default: %(default)g)",
    )


def serve_settings(args: argparse.Namespace) -> ServeSettings:
    """Return the settings from the options of `serve`."""
    return ServeSettings(**{field.name: getattr(args, field.name) for field in fields(ServeSettings)})


def _serve(args: argparse.Namespace) -> int:
    if args.engine is not None:
        check_engine_folder(args.engine)

    from slideredit_rt.serving.run import check_packages, serve

    check_packages()
    settings, options = serve_settings(args), runtime_options(args)

    def announce(place: dict[str, str]) -> None:
        served = f"serving {place['model']}" if "model" in place else "serving"
        emit(args, place, [f"{served} at {place['url']} (API: {place['url']}/docs)"])

    if not args.ray:
        serve(settings, options, progress=not args.quiet, announce=announce)
        return 0
    if find_spec("ray") is None:
        raise SliderEditError("--ray needs Ray Serve; install it with pip install 'slideredit-rt[ray]'")
    from slideredit_rt.serving.ray_app import serve as serve_with_ray

    serve_with_ray(settings, options, progress=not args.quiet, announce=announce)
    return 0


def _export_triton(args: argparse.Namespace) -> int:
    check_engine_folder(args.engine)

    from slideredit_rt.export.inference_server import export_triton

    result = export_triton(args.engine, args.out, overwrite=args.overwrite, **options_given(args, "name", "max_queue_delay_us"))
    batching = f"batches up to {result['max_batch_size']}" if result["max_batch_size"] else "no batching, max_batch_size 0"
    emit(args, result, [f"wrote {result['model']} ({result['platform']}; {batching})"])
    return 0


def _bench_serve(args: argparse.Namespace) -> int:
    from slideredit_rt.bench.serve import Load, bench_serve, default_file, table
    from slideredit_rt.files import atomic_file

    names = ("num_prompts", "request_rate", "max_concurrency", "num_warmups", "sliders", "preview_share", "steps", "seed")
    given = options_given(args, *names, "image")
    if args.instruction:
        given["instructions"] = tuple(args.instruction)
    result = bench_serve(Load(**given), base_url=args.base_url, engine=args.engine, api_key=os.environ.get(KEY_VARIABLE))
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
    place.add_argument(
        "--base-url", help=f"URL of a running server; its key is read from ${KEY_VARIABLE} (default: start a server)"
    )
    place.add_argument("--engine", type=user_path, help="engine folder of the server to start (default: the embedded engine)")
    sub.add_argument("--num-prompts", type=int, metavar="N", help="requests to measure (default: 64)")
    sub.add_argument(
        "--request-rate", type=float, metavar="RATE", help="requests per second, at random times (default: inf, all at once)"
    )
    sub.add_argument("--max-concurrency", type=int, metavar="N", help="most requests in flight at a time (default: no limit)")
    sub.add_argument("--num-warmups", type=int, metavar="N", help="requests sent before the measurement (default: 4)")
    sub.add_argument(
        "--sliders", choices=("mixed", "equal"), help="sliders drawn per request, or the same for all (default: mixed)"
    )
    sub.add_argument(
        "--preview-share", type=float, metavar="SHARE", help="share of previews among the requests, 0 to 1 (default: 0)"
    )
    sub.add_argument("--steps", type=int, help="denoising steps (default: the server's)")
    sub.add_argument("--image", "--picture", type=user_path, help="image to edit (default: images of the default world)")
    sub.add_argument(
        "--instruction", action="append", help="instruction of the prompt; repeatable (default: two of the default world)"
    )
    sub.add_argument("--seed", type=int, help="seed of strengths, noise and sending times (default: 0)")
    sub.add_argument("--save-result", action="store_true", help="write the result as JSON")
    sub.add_argument(
        "--result-dir", type=user_path, default=Path(), help="folder for the result (default: the working directory)"
    )
    sub.add_argument(
        "--result-filename", metavar="NAME", help="file name of the result (default: made from rate, concurrency and time)"
    )


def add_commands(commands: Commands) -> None:
    """Add the commands of this module."""
    serve = commands.add("serve", _serve, "serve edits over HTTP, with a web page to try them")
    add_serve_options(serve)

    bench = commands.group("bench", "measure a server")
    _add_bench_options(bench.add("serve", _bench_serve, "send edits to a server and measure latency and throughput"))

    triton = commands.add("export-triton", _export_triton, "export an engine as a model for NVIDIA Triton Inference Server")
    triton.add_argument("engine", type=user_path, metavar="ENGINE", help="engine folder, built for onnxruntime or tensorrt")
    triton.add_argument(
        "--out", type=user_path, required=True, help="model repository to write to; other models in it are kept"
    )
    triton.add_argument("--name", help="model name (default: slider_backbone)")
    triton.add_argument(
        "--max-queue-delay-us",
        type=int,
        metavar="N",
        help="longest wait for other requests to batch with, in microseconds (default: 0)",
    )
    triton.add_argument("--overwrite", action="store_true", help="replace an existing model of that name")
