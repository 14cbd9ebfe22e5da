"""A server under thousands of requests, many of which end badly (`make soak`: 10,000 of them, or `SOAK_REQUESTS`)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from http_server import image_of, waited_for

from slideredit_rt.bench.serve import ENDPOINT, Load, bodies_of, local_server, open_client

pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10000"))
CONCURRENT = 16
# Of a hundred requests.
KINDS = {"whole": 60, "cancelled": 15, "malformed": 15, "slow reader": 10}
DIFFERENT = 50
"""Edits that are sent over and over, so that an answer that belongs to another request would be seen."""
WARM, GROWTH = 0.3, 1.05

MALFORMED: tuple[tuple[int, Any], ...] = (
    (400, b""),
    (400, b'{"image": "'),
    (400, b"[" * 10_000),
    (400, {"prompt": 3}),
    (400, {"sliders": []}),
    (400, {"surprise": True}),
    (400, {"num_inference_steps": 10**9}),
    (400, {"sliders": [{"instruction": "make the circle red", "strength": 1e9}]}),
    (404, {"model": "another"}),
    (422, {"image": base64.b64encode(b"no image").decode()}),
    (422, {"prompt": "say nothing of it", "sliders": [{"instruction": "make the circle red"}]}),
)


@dataclass
class Account:
    """What was sent and what came back."""

    sent: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    images: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    rss: list[int] = field(default_factory=list)

    def check(self, seed: int, answer: dict[str, Any]) -> None:
        """One image, of the edit that was asked for."""
        (image,) = answer["data"]
        assert image["seed"] == seed
        pixels = np.asarray(image_of(image), dtype=np.int16)
        first = self.images.setdefault(seed, pixels)
        # Its neighbours in a batch may move the last bit before rounding.
        assert np.abs(pixels - first).max() <= 1


async def whole(client: httpx.AsyncClient, body: dict[str, Any], account: Account) -> None:
    response = await client.post(ENDPOINT, json=body)
    assert response.status_code == 200, response.text
    account.check(body["seed"], response.json())


async def cancelled(client: httpx.AsyncClient, body: dict[str, Any], account: Account, seconds: float) -> None:
    """Goes away after a moment; it may have its answer by then."""
    task = asyncio.create_task(client.post(ENDPOINT, json=body))
    done, _ = await asyncio.wait([task], timeout=seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if done:
        assert task.result().status_code == 200
        account.check(body["seed"], task.result().json())
        account.answered["cancelled too late"] += 1


async def malformed(client: httpx.AsyncClient, body: dict[str, Any], status: int, fault: Any) -> None:
    content = fault if isinstance(fault, bytes) else json.dumps({**body, **fault}).encode()
    response = await client.post(ENDPOINT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, (fault, response.text)
    assert response.json()["error"]["message"]


async def slow_reader(url: str, body: dict[str, Any], account: Account, rng: random.Random) -> None:
    """Takes its answer in small pieces, late."""
    place = urlsplit(url)
    content = json.dumps(body).encode()
    head = f"POST {ENDPOINT} HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1024)
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await asyncio.sleep(rng.uniform(0, 0.5))
        answer = b""
        while piece := await reader.read(1024):
            answer += piece
            await asyncio.sleep(0.01)
    finally:
        writer.close()
    head_lines, _, payload = answer.partition(b"\r\n\r\n")
    assert head_lines.startswith(b"HTTP/1.1 200"), answer[:500]
    account.check(body["seed"], json.loads(payload))


async def soak(url: str, process: psutil.Process, account: Account) -> None:
    rng = random.Random(0)
    bodies = [body | {"seed": i} for i, body in enumerate(bodies_of(Load(num_prompts=DIFFERENT, num_warmups=0, steps=1)))]
    plan = rng.choices(list(KINDS), list(KINDS.values()), k=REQUESTS)
    numbers = iter(enumerate(plan))
    every = max(1, REQUESTS // 100)
    async with open_client(url) as client:

        async def work() -> None:
            for number, kind in numbers:
                body = rng.choice(bodies)
                account.sent[kind] += 1
                if kind == "whole":
                    await whole(client, body, account)
                elif kind == "cancelled":
                    await cancelled(client, body, account, rng.uniform(0, 0.3))
                elif kind == "malformed":
                    await malformed(client, body, *rng.choice(MALFORMED))
                else:
                    await slow_reader(url, body, account, rng)
                account.answered[kind] += 1
                if number % every == 0:
                    account.rss.append(process.memory_info().rss)

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT):
                group.create_task(work())


def totals(metrics: str, name: str, *labels: str) -> float:
    lines = [line.rpartition(" ") for line in metrics.splitlines()]
    return sum(float(value) for key, _, value in lines if key.split("{")[0] == name and all(label in key for label in labels))


def test_soak(engines: dict[str, Path]) -> None:
    account, started = Account(), time.monotonic()
    with local_server(str(engines["st"]), "--threads", "1") as (url, pid):
        process = psutil.Process(pid)
        asyncio.run(soak(url, process, account))
        seconds = time.monotonic() - started
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:

            def idle() -> str | None:
                """The metrics, once no edit is under way."""
                text = client.get("/metrics").text
                waiting = totals(text, "slideredit_queued_images") + totals(text, "slideredit_running_images")
                return None if waiting else text

            metrics = waited_for(idle, 60, every=0.1)
            assert metrics is not None, "edits are still under way that nobody waits for"
            assert client.get("/health").json() == {"status": "ok"}
        threads = process.num_threads()
    # Every request had its answer, or was given up by its client.
    assert account.sent.total() == REQUESTS
    assert all(account.answered[kind] == account.sent[kind] for kind in KINDS)
    # The server made as many edits as were answered: none twice, and none but cancelled ones that nobody got.
    completed = totals(metrics, "slideredit_requests_total", 'outcome="completed"')
    asked = account.sent["whole"] + account.sent["slow reader"]
    assert asked + account.answered["cancelled too late"] <= completed <= asked + account.sent["cancelled"]
    assert totals(metrics, "slideredit_requests_total", 'outcome="failed"') == 0
    assert totals(metrics, "slideredit_http_responses_total", 'status="500"') == 0
    warm = statistics.median(account.rss[int(WARM * len(account.rss)) :][: max(1, len(account.rss) // 10)])
    end = statistics.median(account.rss[-max(1, len(account.rss) // 10) :])
    report = {
        "requests": REQUESTS,
        "seconds": round(seconds, 1),
        "sent": dict(account.sent),
        "edits": int(completed),
        "cancelled in time": account.sent["cancelled"] - account.answered["cancelled too late"],
        "rss_mib": {
            "first": account.rss[0] >> 20,
            "warm": int(warm) >> 20,
            "end": int(end) >> 20,
            "ratio": round(end / warm, 3),
            "every tenth": [rss >> 20 for rss in account.rss[:: max(1, len(account.rss) // 10)]],
        },
        "threads": threads,
    }
    sys.stdout.write(f"\n{json.dumps(report, indent=2)}\n")
    assert end <= GROWTH * warm
