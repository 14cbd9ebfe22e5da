"""Server in this process: builds the application from settings and runs it."""

from __future__ import annotations

import atexit
import gc
import hashlib
import math
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
from slideredit_rt.notes import note, print_notes
from slideredit_rt.serving.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from slideredit_rt.editor import SliderEditor
    from slideredit_rt.engines import RuntimeOptions
    from slideredit_rt.memory import ServerParts
    from slideredit_rt.serving.service import EditService

_PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "fastapi_swagger")
Announce = Callable[[dict[str, str]], None]
"""Callback that receives the server's `url` and, if known, its `model`."""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_CACHE_MIB = 256
_SWITCH_INTERVAL = 0.0005
"""Seconds that a thread may hold the interpreter lock while another one waits for it.

The stepping thread releases the lock in every step. With Python's default of 5 ms, it would wait for the HTTP threads as long
as a small step takes."""


def check_packages() -> None:
    """Raise if packages of the extra `serve` are missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise SliderEditError(f"serving needs {', '.join(missing)}; install them with pip install 'slideredit-rt[serve]'")


def serve(settings: ServeSettings, options: RuntimeOptions | None, *, progress: bool, announce: Announce) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: Server settings.
        options: Run options of a TensorRT engine.
        progress: Show progress bars on standard error while the embedded engine is built.
        announce: Called with the address when the server accepts requests.

    Raises:
        SliderEditError: The address is not available, or the engine cannot run here.
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
                sys.stderr.write(
                    f"slideredit-rt: anyone who can reach {settings.host} can use this server; set a key with --api-key-file\n"
                )

        server = Server(app, service, drain_seconds=settings.drain_seconds, on_ready=ready)
        try:
            server.run([listener])
        finally:
            service.close(drain=False)
            # Undo the freeze: on exit, Triton warns about objects that were not collected.
            gc.unfreeze()


def make_app(settings: ServeSettings, options: RuntimeOptions | None) -> tuple[FastAPI, EditService, str]:
    """Create the application and tune this process for serving.

    Args:
        settings: Server settings with an engine (see `with_engine`).
        options: Run options of a TensorRT engine.

    Returns:
        The application, its service, and the model name for clients.

    Raises:
        SliderEditError: The engine cannot run here, or the preview decoder does not fit it.
    """
    import torch

    from slideredit_rt.editor import SliderEditor
    from slideredit_rt.preview_decoder import PreviewDecoder
    from slideredit_rt.serving.adapter_folder import AdapterFolder
    from slideredit_rt.serving.app import create_app
    from slideredit_rt.serving.body import Limits
    from slideredit_rt.serving.cache import Caching
    from slideredit_rt.serving.metrics import Metrics
    from slideredit_rt.serving.service import EditService

    sys.setswitchinterval(_SWITCH_INTERVAL)
    # Images are encoded and decoded beside the engine, whose threads all stall while one of them has no core.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    assert settings.engine is not None
    print_notes()  # a replica of Ray is not started by our command
    editor = SliderEditor.from_engine(settings.engine, settings.base, settings.run(options), server_parts(settings))
    if editor.adapters is not None:
        editor.adapters.max_bytes = settings.adapters_mib * 2**20
    if settings.preview_decoder is not None:
        editor.preview_decoder = PreviewDecoder.load(settings.preview_decoder, editor.family, editor.pipeline)
    service = EditService(
        editor,
        max_queue=settings.max_queue,
        caching=Caching(cache_size(settings, editor), settings.latent_cache),
        max_batch=settings.max_batch,
        step_batching=settings.step_batching,
        observer=Metrics(),
        adapters=None if settings.adapters is None else AdapterFolder(settings.adapters),
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
    # Freeze long-lived objects: a full collection over all modules takes about 0.3 s and stalls every request.
    gc.collect()
    gc.freeze()
    return app, service, model


def server_parts(settings: ServeSettings) -> ServerParts:
    """Return what the server keeps on the device beside an edit.

    Without `--adapters`, only the engine's own adapter is counted.

    Args:
        settings: Server settings.

    Raises:
        SliderEditError: The preview decoder cannot be found, or is another class than `AutoencoderTiny`.
    """
    from slideredit_rt.memory import ServerParts
    from slideredit_rt.preview_decoder import decoder_folder

    cache_mib = _CACHE_MIB if settings.cache_mib is None else settings.cache_mib
    return ServerParts(
        adapters=None if settings.adapters is None else settings.adapters_mib * 2**20,
        preview_decoder=None if settings.preview_decoder is None else decoder_folder(settings.preview_decoder),
        cache=cache_mib * 2**20,
        caches_keys_values=settings.cache_mib is None,
    )


def cache_size(settings: ServeSettings, editor: SliderEditor) -> int:
    """Return the bytes of the cache of encodings. Log a note if it does not hold an image's keys and values.

    Args:
        settings: Server settings with an engine (see `with_engine`).
        editor: Editor of the engine.
    """
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.memory import keys_values_size

    assert settings.engine is not None
    mib, keys_values = settings.cache_mib, keys_values_size(read_manifest(settings.engine), editor.pipeline)
    if mib is None:
        return _CACHE_MIB * 2**20 + keys_values
    if mib * 2**20 < keys_values:
        note(
            f"--cache-mib {mib} is less than the {math.ceil(keys_values / 2**20)} MiB of an image's keys and values, so every "
            "edit reads its source images again; give more, or leave it out"
        )
    return mib * 2**20


def _bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Called before the engine is loaded, so that a bad address fails at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise SliderEditError(f"cannot listen on {host}:{port}: {error}; give another --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Listen now, so that no other process can take the port while the engine loads.
        listener.listen()
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise SliderEditError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from None


def with_engine(settings: ServeSettings, *, progress: bool) -> ServeSettings:
    """Return the settings with an engine: the embedded one by default.

    The embedded engine is built if it is missing, or if the files that it links have moved.

    Args:
        settings: Server settings.
        progress: Show progress bars on standard error during the build.
    """
    if settings.engine is not None:
        return settings
    from slideredit_rt.assets import DEFAULT_WORLD, base_of
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.export.build import build_engine

    folder = _default_engine()
    try:
        read_manifest(folder)
    except SliderEditError:
        build_engine(base_of(DEFAULT_WORLD), f"{DEFAULT_WORLD}-st", folder, overwrite=True, progress=progress)
    return replace(settings, engine=folder)


def _default_engine() -> Path:
    """Return the folder of the embedded engine, which depends on the contents of its base and adapter."""
    from slideredit_rt.assets import DEFAULT_WORLD, base_of, resolve_adapter, resolve_base
    from slideredit_rt.files import cache_directory, folder_fingerprint, sha256

    adapter = f"{DEFAULT_WORLD}-st"
    parts = folder_fingerprint(resolve_base(base_of(DEFAULT_WORLD))), sha256(resolve_adapter(adapter))
    kept = cache_directory() / "engines" / hashlib.sha256("".join(parts).encode()).hexdigest()[:16] / adapter
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if os.access(kept.parent, os.W_OK):
            return kept
    except OSError:
        pass
    folder = Path(tempfile.mkdtemp(prefix="slideredit-rt-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / adapter
