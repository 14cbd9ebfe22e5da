"""A server of this process: from its settings to an application, and its run."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from slideredit_rt.engines import RuntimeOptions
    from slideredit_rt.serving.service import EditService

_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "fastapi_swagger")
Announce = Callable[[dict[str, str]], None]
"""Tells where requests are taken: `url` and, where it is known, `model`."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SWITCH_INTERVAL = 0.0005
"""Seconds that a thread may keep Python's lock while another one waits for it. The thread that makes the engine's steps gives
the lock up in every step, and with Python's usual 5 ms would wait for the threads of HTTP as long as a small step takes."""


def check_packages() -> None:
    """Refuse to serve without what the extra `serve` brings."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise SliderEditError(f"serving needs {', '.join(missing)}; install them with pip install 'slideredit-rt[serve]'")


def serve(settings: ServeSettings, options: RuntimeOptions | None, *, progress: bool, announce: Announce) -> None:
    """Serve until a signal comes.

    Args:
        options: of a TensorRT engine.
        progress: show progress bars on standard error while the embedded engine is built.
        announce: called when requests are taken.

    Raises:
        SliderEditError: an address that cannot be had, or an engine that cannot be run.
    """
    key = settings.read_key()
    with _bind(settings.host, settings.port) as listener:
        from slideredit_rt.serving.server import Server

        settings = with_engine(settings, progress=progress)
        app, service, model = make_app(settings, options)
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def ready() -> None:
            announce({"url": url, "model": model})
            if key is None and settings.host not in _LOOPBACK:
                sys.stderr.write(f"slideredit-rt: whoever reaches {settings.host} may use it; --api-key-file asks for a key\n")

        server = Server(app, service, drain_seconds=settings.drain_seconds, on_ready=ready)
        try:
            server.run([listener])
        finally:
            service.close(drain=False)
            # Triton complains at the end of what it finds uncollected.
            gc.unfreeze()


def make_app(settings: ServeSettings, options: RuntimeOptions | None) -> tuple[FastAPI, EditService, str]:
    """The application and the service that it is over, and what clients call the engine; settles this process for serving.

    Args:
        settings: with an engine, see `with_engine`.
        options: of a TensorRT engine.

    Raises:
        SliderEditError: an engine that cannot be run here.
    """
    import torch

    from slideredit_rt.editor import SliderEditor
    from slideredit_rt.serving.app import create_app
    from slideredit_rt.serving.body import Limits
    from slideredit_rt.serving.metrics import Metrics
    from slideredit_rt.serving.service import EditService

    sys.setswitchinterval(_SWITCH_INTERVAL)
    # Images are encoded and decoded beside the engine, whose threads stand still as long as one of them has no core.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    assert settings.engine is not None
    editor = SliderEditor.from_engine(settings.engine, settings.base, threads=settings.threads, options=options)
    service = EditService(
        editor,
        max_queue=settings.max_queue,
        cache_bytes=settings.cache_mib * 2**20,
        max_batch=settings.max_batch,
        step_batching=settings.step_batching,
        observer=Metrics(),
    )
    model = settings.model or settings.engine.resolve().name
    limits = Limits(
        body_bytes=int(settings.max_body_mib * 2**20),
        pixels=int(settings.max_megapixels * 1e6),
        request_seconds=settings.request_seconds,
    )
    app = create_app(
        service,
        model=model,
        api_key=settings.read_key(),
        limits=limits,
        preview_steps=settings.preview_steps,
        allowed_hosts=[name for name in (settings.host, socket.gethostname(), *settings.allowed_host) if name],
        allowed_origins=settings.allow_origin,
    )
    # What lives as long as the process is put out of the garbage collector's sight: it would walk through all modules for some
    # tenths of a second now and then, while every request waits, and for that reason come by too seldom.
    gc.collect()
    gc.freeze()
    return app, service, model


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


def with_engine(settings: ServeSettings, *, progress: bool) -> ServeSettings:
    """The settings with an engine: the embedded one where none was named, built where it is not yet, or from files that have
    moved since."""
    if settings.engine is not None:
        return settings
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.export.build import build_engine

    folder = _default_engine()
    try:
        read_manifest(folder)
    except SliderEditError:
        build_engine("shapes-kontext", "shapes-st", folder, overwrite=True, progress=progress)
    return replace(settings, engine=folder)


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
