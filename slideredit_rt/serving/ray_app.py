"""Ray Serve application: several engines behind one address, each in its own replica.

Start it with `slideredit-rt serve --ray`, or with `serve run slideredit_rt.serving.ray_app:app engine=FOLDER min_replicas=2`,
where the arguments are the options of `slideredit-rt serve`. Sliders are part of the request body and do not affect routing: a
model id per adapter or strength (`serve.multiplexed`) would separate requests that can share an engine step.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from starlette.types import ASGIApp

from slideredit_rt.engines import RuntimeOptions
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving.run import Announce, make_app, with_engine
from slideredit_rt.serving.settings import ServeSettings

NAME = "slideredit"
DEPLOYMENT = "edits"
CLUSTER_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "slideredit_rt.serving.ray_proxy:middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Environment of a cluster's nodes: a 503 response if a replica dies, and more time for a proxy to start."""

_OBJECT_STORE = 100 * 2**20  # in bytes; small, because requests and responses do not pass through it


class EditReplica:
    """Replica with one engine, its service and its HTTP API.

    Args:
        settings: Server settings with an engine.
        options: Run options of a TensorRT engine.
    """

    def __init__(self, settings: ServeSettings, options: RuntimeOptions | None) -> None:
        self._app, self._service, _ = make_app(settings, options)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def check_health(self) -> None:
        """Raise if the service has stopped, so that Ray replaces the replica."""
        if self._service.closed:
            raise RuntimeError("the edit service has stopped")

    def __del__(self) -> None:
        # Ray has already waited for the requests in flight.
        if hasattr(self, "_service"):
            self._service.close(drain=False)


def application(
    settings: ServeSettings, options: RuntimeOptions | None = None, *, progress: bool = False
) -> ray_serve.Application:
    """Create the Ray Serve application for these settings.

    A replica accepts as many requests as its queue holds and answers 429 beyond that. When all replicas are full, Ray's proxy
    queues as many again before it answers 429 itself. Replicas are added when each has more requests than fit in a step.

    Args:
        settings: Server settings.
        options: Run options of a TensorRT engine.
        progress: Show progress bars on standard error while the embedded engine is built.

    Raises:
        SliderEditError: The engine folder is damaged or not an engine.
    """
    low, high = settings.min_replicas, settings.most_replicas
    folder = with_engine(settings, progress=progress).engine
    assert folder is not None
    settings = replace(settings, engine=folder).from_anywhere()
    scaling: dict[str, Any] = {"num_replicas": low}
    if low < high:
        together = settings.max_batch or read_manifest(folder).max_batch
        scaling = {
            "autoscaling_config": AutoscalingConfig(min_replicas=low, max_replicas=high, target_ongoing_requests=together)
        }
    deployment = ray_serve.deployment(
        ray_serve.ingress()(EditReplica),
        name=DEPLOYMENT,
        max_ongoing_requests=settings.max_queue,
        max_queued_requests=settings.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        **scaling,
    )
    return deployment.bind(settings, options)


def app(arguments: dict[str, str | list[str]]) -> ray_serve.Application:
    """Build the application for `serve run` and Ray's configuration files.

    Host and port are set in Ray's `http_options`. Start the cluster's nodes with `CLUSTER_ENVIRONMENT`.

    Args:
        arguments: Options of `slideredit-rt serve` by name, such as `engine` and `max_replicas`. A repeatable one, such as
            `allowed_host`, also takes a list.
    """
    return application(ServeSettings.from_arguments(arguments))


def start_cluster(**local: Any) -> None:
    """Join the cluster at `$RAY_ADDRESS`, or start one on this machine.

    Args:
        **local: Arguments of `ray.init` for a cluster on this machine.
    """
    # The processes of a local cluster inherit this environment.
    for name, value in CLUSTER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
    else:
        ray.init(**{"include_dashboard": False, "object_store_memory": _OBJECT_STORE, "log_to_driver": False, **local})


def serve(settings: ServeSettings, options: RuntimeOptions | None, *, progress: bool, announce: Announce) -> None:
    """Serve on Ray until SIGINT or SIGTERM, then finish accepted requests.

    Args:
        settings: Server settings.
        options: Run options of a TensorRT engine.
        progress: Show progress bars on standard error while the embedded engine is built.
        announce: Called with the address when the server accepts requests.

    Raises:
        SliderEditError: The port is 0, the API key cannot be read, or the engine is not usable.
    """
    if settings.port == 0:
        raise SliderEditError("--port is 0, but Ray Serve cannot pick a free port; give one")
    settings.read_key()
    edits = application(settings, options, progress=progress)
    start_cluster()
    try:
        ray_serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port))
        ray_serve.run(edits, name=NAME)
        announce({"url": f"http://{settings.host}:{settings.port}"})
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        ray_serve.delete(NAME)
    finally:
        ray_serve.shutdown()
        ray.shutdown()
