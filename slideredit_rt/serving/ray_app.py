"""Ray Serve: several engines behind one address, each in a replica of its own.

`slideredit-rt serve --ray`, or `serve run slideredit_rt.serving.ray_app:app engine=FOLDER min_replicas=2` with the options of
`slideredit-rt serve` as arguments. Sliders are part of a request's body and play no part in its routing: a model id per adapter
or strength (`serve.multiplexed`) would keep requests apart that share an engine step.
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
"""Environment of a cluster's nodes: 503 for requests whose replica died, and time for a proxy to start on a busy machine."""

_OBJECT_STORE = 100 * 2**20  # bytes of a local cluster; requests and answers do not pass through it


class EditReplica:
    """One engine, its service and the HTTP API over it.

    Args:
        settings: with an engine.
        options: of a TensorRT engine.
    """

    def __init__(self, settings: ServeSettings, options: RuntimeOptions | None) -> None:
        self._app, self._service, _ = make_app(settings, options)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def check_health(self) -> None:
        """Raises when the service has stopped; Ray then starts another replica."""
        if self._service.closed:
            raise RuntimeError("the edit service has stopped")

    def __del__(self) -> None:
        # Ray has waited for the requests under way.
        if hasattr(self, "_service"):
            self._service.close(drain=False)


def application(
    settings: ServeSettings, options: RuntimeOptions | None = None, *, progress: bool = False
) -> ray_serve.Application:
    """The application that the settings describe; `progress` of building the embedded engine.

    A replica takes as many requests as its queue holds and answers 429 by itself; where all are full, Ray's proxy holds as many
    again and answers 429, too. More replicas come when there is more than one engine step's worth of requests for each.

    Raises:
        SliderEditError: an engine that is not one.
    """
    low, high = settings.min_replicas, settings.most_replicas
    folder = with_engine(settings, progress=progress).engine
    assert folder is not None
    settings = replace(settings, engine=folder.resolve())
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
    """For `serve run` and Ray's configuration files: the options of `slideredit-rt serve`, such as `engine` and `max_replicas`.

    An option that may be repeated, such as `allowed_host`, also takes a list. Address and port are Ray's own (`http_options`).
    The cluster's nodes want `CLUSTER_ENVIRONMENT` when they are started.
    """
    return application(ServeSettings.from_arguments(arguments))


def start_cluster(**local: Any) -> None:
    """Join the cluster that `$RAY_ADDRESS` names, or start one on this machine.

    Args:
        local: arguments of `ray.init` for a cluster on this machine.
    """
    # Processes of a local cluster inherit it.
    for name, value in CLUSTER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
    else:
        ray.init(**{"include_dashboard": False, "object_store_memory": _OBJECT_STORE, "log_to_driver": False, **local})


def serve(settings: ServeSettings, options: RuntimeOptions | None, *, progress: bool, announce: Announce) -> None:
    """Serve until a signal comes, then finish what was accepted.

    Args:
        options, progress, announce: as for `slideredit_rt.serving.run.serve`.

    Raises:
        SliderEditError: a port that Ray does not take, or arguments that make no sense.
    """
    if settings.port == 0:
        raise SliderEditError("Ray Serve needs a port of its own; give --port")
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
