"""Ray Serve with two replicas on this machine, one of which is killed under load (`make ray-test`)."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from http_server import image_of, waited_for

from slideredit_rt.bench.serve import Load, bodies_of
from slideredit_rt.serving.settings import ServeSettings

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs pip install 'slideredit-rt[ray]'")
serve = pytest.importorskip("ray.serve")
ray_app = pytest.importorskip("slideredit_rt.serving.ray_app")

REQUESTS, CONCURRENT, KILL_AFTER = 40, 8, 8
READY_SECONDS = 600


def free_port() -> int:
    """Not from the range that the system gives to Ray's own processes, which would take it before the proxy does."""
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def url(engines: dict[str, Path]) -> Iterator[str]:
    port = free_port()
    try:
        ray_app.start_cluster(num_cpus=2)
        serve.start(http_options=serve.config.HTTPOptions(host="127.0.0.1", port=port))
        settings = ServeSettings(engines["st"], min_replicas=2, threads=1, model="shapes")
        serve.run(ray_app.application(settings), name=ray_app.NAME)
        yield f"http://127.0.0.1:{port}"
    finally:
        # The last test has ended this cluster; asked once more, Ray Serve would start another one.
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def replicas() -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith(f"SERVE_REPLICA::{ray_app.NAME}#")]


def kill(replica: str) -> None:
    ray.kill(ray.get_actor(replica, namespace="serve"))


def test_the_surface_is_the_servers(url: str) -> None:
    (body,) = bodies_of(Load(num_prompts=1, num_warmups=0, steps=2))
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        assert client.get("/v2/health/ready").json() == {"ready": True}
        assert client.get("/v1/models").json()["data"][0]["id"] == "shapes"
        answer = client.post("/v1/images/edits", json=body)
        assert image_of(answer.json()["data"][0]).size == (64, 64)
        refused = client.post("/v1/images/edits", json={**body, "prompt": "something else"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "unprocessable_edit")
        strangers = (({"host": "evil.example"}, "host_not_allowed"), ({"origin": "https://evil.example"}, "origin_not_allowed"))
        for headers, code in strangers:
            refused = client.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, code)
        with client.stream("POST", "/v1/images/edits", json={**body, "stream": True, "partial_images": 1}) as stream:
            events = [line for line in stream.iter_lines() if line.startswith("event:")]
        assert events == ["event: image_edit.partial_image", "event: image_edit.completed"]


def test_a_killed_replica_costs_no_more_than_a_clear_503(url: str) -> None:
    bodies = [body | {"seed": seed} for seed, body in enumerate(bodies_of(Load(num_prompts=REQUESTS, num_warmups=0, steps=12)))]
    answers: list[tuple[int, int, Any]] = []
    victim, survivor = sorted(replicas())

    async def load() -> None:
        limit = asyncio.Semaphore(CONCURRENT)
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client, asyncio.TaskGroup() as group:

            async def one(body: dict[str, Any]) -> None:
                async with limit:
                    response = await client.post("/v1/images/edits", json=body)
                answers.append((body["seed"], response.status_code, response.json()))
                if len(answers) == KILL_AFTER:
                    await asyncio.to_thread(kill, victim)

            for body in bodies:
                group.create_task(one(body))

    asyncio.run(load())
    # Each exactly once.
    assert sorted(seed for seed, *_ in answers) == list(range(REQUESTS))
    lost = [answer for _, status, answer in answers if status != 200]
    for seed, status, answer in answers:
        if status == 200:
            assert [image["seed"] for image in answer["data"]] == [seed]
        else:
            assert status == 503
            assert answer["error"]["code"] == "replica_lost"
    # No more than were under way at once; the others went on with the replica that was left.
    assert len(lost) <= CONCURRENT
    assert survivor in replicas()
    sys.stdout.write(f"\n{REQUESTS} requests, {len(lost)} ended in 503 when a replica was killed\n")

    replaced = waited_for(lambda: len(replicas()) >= 2 and victim not in replicas(), READY_SECONDS, every=1)
    assert replaced, "the killed replica was not replaced"


def test_more_replicas_come_with_the_queue(engines: dict[str, Path]) -> None:
    """As `serve run` hands its arguments over."""
    built = ray_app.app({"engine": str(engines["st"]), "max_replicas": "4", "max_batch": "8", "max_queue": "32"})
    scaling = built._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 8)


def test_the_command_serves_and_leaves_nothing_running(engines: dict[str, Path]) -> None:
    """After the cluster of the other tests: one at a time is what this machine holds."""
    serve.shutdown()
    ray.shutdown()
    before = {process.pid for process in psutil.process_iter()}
    command = [sys.executable, "-m", "slideredit_rt.cli", "serve", str(engines["st"]), "--ray", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen([*command, "--port", str(free_port())], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            assert httpx.get(f"{url}/health", trust_env=False, timeout=60).json() == {"status": "ok"}
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
    left = [p for p in psutil.process_iter(["name"]) if p.pid not in before and "ray" in p.info["name"].lower()]
    psutil.wait_procs(left, timeout=30)
    assert not [p for p in left if p.is_running()]
