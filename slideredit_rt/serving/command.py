"""`slideredit-rt serve`."""

from __future__ import annotations

import argparse
import atexit
import gc
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import user_path

if TYPE_CHECKING:
    from fastapi import FastAPI

    from slideredit_rt.engines import RuntimeOptions
    from slideredit_rt.serving.service import EditService

_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "fastapi_swagger")
_KEY_VARIABLE = "SLIDEREDIT_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SWITCH_INTERVAL = 0.0005
"""Seconds that a thread may keep Python's lock while another one waits for it. The thread that makes the engine's steps gives
the lock up in every step, and with Python's usual 5 ms would wait for the threads of HTTP as long as a small step takes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `slideredit-rt serve`."""
    parser.add_argument(
        "engine",
        type=user_path,
        nargs="?",
        metavar="ENGINE",
        help="folder written by slideredit-rt build (default: the embedded one)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s; 0 takes a free one)")
    parser.add_argument("--model", help="what clients call it (default: the name of the engine's folder)")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key-file", type=user_path, metavar="FILE", help=f"holds the key (default: ${_KEY_VARIABLE})")
    key.add_argument("--api-key", metavar="KEY", help="other users of this machine can read it in the list of processes")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that clients call the server by, besides IP addresses, localhost, --host and this machine's name; "
        "repeatable; * takes any, which an API key does as well",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may use the server besides its own, as https://example.com; repeatable; * takes all",
    )
    parser.add_argument("--base", help="where the base checkpoint is, if not where the manifest says")
    parser.add_argument("--threads", type=int, help="CPU threads of the backend")
    parser.add_argument("--max-queue", type=int, default=64, help="images that may wait, before 429 (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, help="most images in an engine step (default: the engine's)")
    parser.add_argument("--no-step-batching", action="store_true", help="one edit after the other, for comparisons")
    parser.add_argument("--cache-mib", type=int, default=256, help="for encoded pictures and prompts (default: %(default)s)")
    parser.add_argument("--max-megapixels", type=float, default=16.0, help="of a picture that is sent (default: %(default)g)")
    parser.add_argument("--max-body-mib", type=float, default=32.0, help="of a request (default: %(default)g)")
    parser.add_argument("--request-seconds", type=float, default=300.0, help="for an edit, before 504 (default: %(default)g)")
    parser.add_argument("--preview-steps", type=int, default=4, help="of previews that say nothing (default: %(default)s)")
    parser.add_argument(
        "--drain-seconds", type=float, default=30.0, help="for accepted edits to finish after a signal (default: %(default)g)"
    )
    ray = parser.add_argument_group("on several processes or machines (pip install 'slideredit-rt[ray]')")
    ray.add_argument("--ray", action="store_true", help="with Ray Serve, on the cluster that $RAY_ADDRESS names or a local one")
    ray.add_argument("--min-replicas", type=int, default=1, help="engines at all times (default: %(default)s)")
    ray.add_argument("--max-replicas", type=int, help="engines while the queue is long (default: as many as at all times)")
    ray.add_argument("--replica-cpus", type=float, default=1, help="that Ray counts for each (default: %(default)g)")
    ray.add_argument("--replica-gpus", type=float, default=0, help="that Ray counts for each (default: %(default)g)")


def serve(args: argparse.Namespace, options: RuntimeOptions | None) -> int:
    """Serve until a signal comes.

    Raises:
        SliderEditError: a missing package, an address that cannot be had, or an engine that cannot be run.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise SliderEditError(f"serving needs {', '.join(missing)}; install them with pip install 'slideredit-rt[serve]'")
    _check(args)
    if args.ray:
        return _serve_with_ray(args, options)
    key = read_api_key(args)
    listener = _bind(args.host, args.port)
    with listener:
        from slideredit_rt.serving.server import Server

        app, service, model = make_app(args, options, key)
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def ready() -> None:
            line = json.dumps({"url": url, "model": model}) if args.json else f"serving {model} at {url} (API: {url}/docs)"
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
            if key is None and args.host not in _LOOPBACK:
                sys.stderr.write(f"slideredit-rt: whoever reaches {host} may use it; --api-key-file asks for a key\n")

        server = Server(app, service, drain_seconds=args.drain_seconds, on_ready=ready)
        try:
            server.run([listener])
        finally:
            service.close(drain=False)
            # Triton complains at the end of what it finds uncollected.
            gc.unfreeze()
    return 0


def _serve_with_ray(args: argparse.Namespace, options: RuntimeOptions | None) -> int:
    if find_spec("ray") is None:
        raise SliderEditError("--ray needs Ray Serve; install it with pip install 'slideredit-rt[ray]'")
    from slideredit_rt.serving.ray_app import serve

    return serve(args, options)


def make_app(args: argparse.Namespace, options: RuntimeOptions | None, key: str | None) -> tuple[FastAPI, EditService, str]:
    """The application and the service that it is over, and what clients call the engine; settles this process for serving.

    Raises:
        SliderEditError: an engine that cannot be run here.
    """
    import torch

    hosts, origins = read_access(args)

    from slideredit_rt.editor import SliderEditor
    from slideredit_rt.serving.app import create_app
    from slideredit_rt.serving.body import Limits
    from slideredit_rt.serving.metrics import Metrics
    from slideredit_rt.serving.service import EditService

    sys.setswitchinterval(_SWITCH_INTERVAL)
    # Pictures are encoded and decoded beside the engine, whose threads stand still as long as one of them has no core.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    folder = prepare_engine(args)
    editor = SliderEditor.from_engine(folder, args.base, threads=args.threads, options=options)
    metrics = Metrics()
    service = EditService(
        editor,
        max_queue=args.max_queue,
        cache_bytes=args.cache_mib * 2**20,
        max_batch=args.max_batch,
        step_batching=not args.no_step_batching,
        observer=metrics,
    )
    model = args.model or folder.resolve().name
    limits = Limits(
        body_bytes=int(args.max_body_mib * 2**20),
        pixels=int(args.max_megapixels * 1e6),
        request_seconds=args.request_seconds,
    )
    app = create_app(
        service,
        model=model,
        api_key=key,
        limits=limits,
        preview_steps=args.preview_steps,
        metrics=metrics,
        allowed_hosts=hosts,
        allowed_origins=origins,
    )
    # What lives as long as the process is put out of the garbage collector's sight: it would walk through all modules for some
    # tenths of a second now and then, while every request waits, and for that reason come by too seldom.
    gc.collect()
    gc.freeze()
    return app, service, model


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that serve nobody."""
    if not 0 <= args.port <= 65535:
        raise SliderEditError(f"--port is {args.port}; give 0 to 65535")
    for name, least in (("preview_steps", 1), ("cache_mib", 0), ("drain_seconds", 0)):
        if getattr(args, name) < least:
            raise SliderEditError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least {least}")
    for name in ("max_megapixels", "max_body_mib", "request_seconds"):
        if not getattr(args, name) > 0:
            raise SliderEditError(f"--{name.replace('_', '-')} is {getattr(args, name):g}; give a number above 0")


def read_api_key(args: argparse.Namespace) -> str | None:
    """The key that clients have to bring; None asks for none."""
    if args.api_key_file is not None:
        try:
            key = args.api_key_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SliderEditError(f"the key file {str(args.api_key_file)!r} cannot be read ({error})") from None
    else:
        key = args.api_key if args.api_key is not None else os.environ.get(_KEY_VARIABLE)
        if key is None:
            return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SliderEditError("the API key is empty, or holds spaces or characters beyond ASCII; choose another one")
    return str(key)


def read_access(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The host names that the server answers to, and the origins whose web pages may use it.

    Raises:
        SliderEditError: a malformed name or origin.
    """
    from slideredit_rt.serving.origins import host_pattern, web_origin

    own = [name for name in (args.host, socket.gethostname()) if name]
    return [*own, *map(host_pattern, args.allowed_host)], list(map(web_origin, args.allow_origin))


def _bind(host: str, port: int) -> socket.socket:
    """A socket at the address, before the engine is loaded: whether it can be had is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise SliderEditError(f"{host!r} port {port} is no address to listen at ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # From now on nobody else gets it.
        listener.listen()
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise SliderEditError(f"cannot listen at {host} port {port} ({reason}); choose another --port") from None


def prepare_engine(args: argparse.Namespace) -> Path:
    """The folder of the engine; the embedded one is built where it is not yet, or from files that have moved since."""
    if args.engine is not None:
        engine: Path = args.engine
        return engine
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.export.build import build_engine

    folder = _default_engine()
    try:
        read_manifest(folder)
    except SliderEditError:
        build_engine("shapes-kontext", "shapes-st", folder, overwrite=True, progress=not args.quiet)
    return folder


def _default_engine() -> Path:
    """Where the engine of the embedded editor is kept: one for each content that it may be built from."""
    from slideredit_rt.assets import resolve_adapter, resolve_base
    from slideredit_rt.files import cache_directory, folder_fingerprint, sha256

    parts = folder_fingerprint(resolve_base("shapes-kontext")), sha256(resolve_adapter("shapes-st"))
    kept = cache_directory() / "engines" / hashlib.sha256("".join(parts).encode()).hexdigest()[:16] / "shapes-st"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if os.access(kept.parent, os.W_OK):
            return kept
    except OSError:
        pass
    folder = Path(tempfile.mkdtemp(prefix="slideredit-rt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "shapes-st"
