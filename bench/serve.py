"""Load test of a server: `slideredit-rt bench serve`, with the options and result keys of `vllm bench serve`."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slideredit_rt import __version__
from slideredit_rt.assets import DEFAULT_WORLD
from slideredit_rt.errors import SliderEditError
from slideredit_rt.samples import SAMPLES

if TYPE_CHECKING:
    import httpx

ENDPOINT = "/v1/images/edits"
PERCENTILES = (90, 95, 99)
_START_SECONDS = 300
_STOP_SECONDS = 60


@dataclass(frozen=True)
class Load:
    """Requests to send to a server, reproducible by the seed.

    Attributes:
        num_prompts: Number of measured requests.
        request_rate: Requests per second at random times (a Poisson process); infinity sends as fast as `max_concurrency`
            allows.
        max_concurrency: Largest number of concurrent requests; None sets no limit.
        num_warmups: Number of requests before the measurement.
        sliders: `mixed` draws the instructions with a slider and the strengths for every request, `equal` uses the same
            sliders for all.
        preview_share: Share of requests that are previews, in [0, 1].
        steps: Denoising steps of full edits and previews; None uses the server's default.
        images: Number of different source images.
        image: File to edit; None uses images of the default world.
        instructions: Instructions of the prompt, which is the same for all requests.
        seed: Seed of strengths, noise and times.

    Raises:
        SliderEditError: A number is out of range.
    """

    num_prompts: int = 64
    request_rate: float = math.inf
    max_concurrency: int | None = None
    num_warmups: int = 4
    sliders: Literal["mixed", "equal"] = "mixed"
    preview_share: float = 0.0
    steps: int | None = None
    images: int = 4
    image: Path | None = None
    instructions: tuple[str, ...] = SAMPLES[DEFAULT_WORLD].instructions
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 1), ("num_warmups", 0), ("images", 1)):
            if getattr(self, name) < least:
                raise SliderEditError(f"--{name.replace('_', '-')} is {getattr(self, name)}; pass at least {least}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise SliderEditError(f"--max-concurrency is {self.max_concurrency}; pass at least 1")
        if not self.request_rate > 0:
            raise SliderEditError(f"--request-rate is {self.request_rate:g}; pass a positive number per second, or inf")
        if not 0 <= self.preview_share <= 1:
            raise SliderEditError(f"--preview-share is {self.preview_share:g}; pass a number from 0 to 1")


@dataclass(frozen=True)
class Answer:
    """Outcome of a request.

    Attributes:
        seconds: Time from sending the request to its complete response.
        preview: True for a preview.
        error: HTTP status or type of the error; None on success.
        words: Message of the error.
    """

    seconds: float
    preview: bool
    error: str | None = None
    words: str = ""


def images_of(load: Load) -> list[str]:
    """Return the source image files in base64.

    Raises:
        SliderEditError: The image file cannot be read.
    """
    if load.image is not None:
        try:
            return [base64.b64encode(load.image.read_bytes()).decode()]
        except OSError as error:
            raise SliderEditError(
                f"image {str(load.image)!r} cannot be read ({error.strerror}); pass the path of an image file"
            ) from None
    images = []
    for image in SAMPLES[DEFAULT_WORLD].draw(load.images):
        file = io.BytesIO()
        image.save(file, "PNG")
        images.append(base64.b64encode(file.getvalue()).decode())
    return images


def bodies_of(load: Load) -> list[dict[str, Any]]:
    """Return the request bodies, warm-up first. Loads with `equal` and `mixed` sliders differ in the sliders only."""
    rng, images = random.Random(load.seed), images_of(load)
    bodies = []
    for _ in range(load.num_warmups + load.num_prompts):
        chosen = rng.sample(load.instructions, rng.randint(1, len(load.instructions)))
        strengths = [round(rng.uniform(0, 1.5), 3) for _ in chosen]
        sliders = zip(chosen, strengths, strict=True) if load.sliders == "mixed" else [(i, 0.5) for i in load.instructions]
        body: dict[str, Any] = {
            "image": rng.choice(images),
            "prompt": " and ".join(load.instructions),
            "sliders": [{"instruction": instruction, "strength": strength} for instruction, strength in sliders],
            "seed": rng.randrange(2**31),
            "preview": rng.random() < load.preview_share,
        }
        bodies.append(body if load.steps is None else body | {"num_inference_steps": load.steps})
    return bodies


async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Send one request. It succeeds if the response contains an image."""
    import httpx

    started = time.perf_counter()
    error, words = None, ""
    try:
        response = await client.post(ENDPOINT, json=body)
        if response.status_code != 200:
            error, words = str(response.status_code), response.text
        elif not base64.b64decode(response.json()["data"][0]["b64_json"]):
            error = "no image"
    except (httpx.HTTPError, ValueError, LookupError) as failure:
        error, words = type(failure).__name__, str(failure)
    return Answer(time.perf_counter() - started, bool(body["preview"]), error, words)


async def send_all(client: httpx.AsyncClient, bodies: Sequence[dict[str, Any]], load: Load) -> list[Answer]:
    """Send all requests at the rate of `load`."""
    limit = nullcontext() if load.max_concurrency is None else asyncio.Semaphore(load.max_concurrency)
    rng, tasks = random.Random(f"times/{load.seed}"), []

    async def one(body: dict[str, Any]) -> Answer:
        async with limit:
            return await send(client, body)

    due = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for body in bodies:
            tasks.append(group.create_task(one(body)))
            if math.isfinite(load.request_rate):
                # Send times do not depend on response times.
                due += rng.expovariate(load.request_rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return [task.result() for task in tasks]


def open_client(base_url: str, api_key: str | None = None) -> httpx.AsyncClient:
    """Open a client without limits on connections or time.

    Raises:
        SliderEditError: httpx is not installed.
    """
    try:
        import httpx
    except ImportError:
        raise SliderEditError("the benchmark needs httpx; install it with pip install 'slideredit-rt[bench]'") from None
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    # Ignore proxies from the environment, which would distort the measurement.
    return httpx.AsyncClient(
        base_url=base_url,
        headers=headers,
        timeout=None,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def measure(client: httpx.AsyncClient, load: Load) -> dict[str, Any]:
    """Send a load and summarise the responses.

    Returns:
        `completed`, `failed`, `errors` (number of each), `duration` in seconds, `request_throughput` in requests per second,
        `{mean,median,std,p90,p95,p99}_e2el_ms`, the same under `preview` for previews only, and `step_batch_size`, the mean
        number of images per engine step, or None if the server has no metrics.

    Raises:
        SliderEditError: A warm-up request failed.
    """
    bodies = await asyncio.to_thread(bodies_of, load)
    if load.num_warmups:
        warmup = await send_all(client, bodies[: load.num_warmups], replace(load, request_rate=math.inf))
        if (failed := next((answer for answer in warmup if answer.error), None)) is not None:
            raise SliderEditError(
                f"the server at {client.base_url} failed a warm-up request ({failed.error}: {failed.words[:200]}); "
                "check the address, the API key and the image"
            )
    before, started = await step_totals(client), time.perf_counter()
    answers = await send_all(client, bodies[load.num_warmups :], load)
    duration, after = time.perf_counter() - started, await step_totals(client)
    completed = [answer for answer in answers if answer.error is None]
    rows, steps = (after[0] - before[0], after[1] - before[1]) if before and after else (0.0, 0.0)
    previews = [answer for answer in completed if answer.preview]
    return {
        "completed": len(completed),
        "failed": len(answers) - len(completed),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
        "duration": duration,
        "request_throughput": len(completed) / duration,
        **latencies([answer.seconds for answer in completed]),
        **({"preview": {"completed": len(previews), **latencies([a.seconds for a in previews])}} if load.preview_share else {}),
        "step_batch_size": rows / steps if steps else None,
    }


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, median, standard deviation and percentiles under vLLM's names; empty if `seconds` is empty."""
    if not seconds:
        return {}
    ms = [1000 * second for second in seconds]
    return {
        "mean_e2el_ms": statistics.fmean(ms),
        "median_e2el_ms": statistics.median(ms),
        "std_e2el_ms": statistics.pstdev(ms),
        **{f"p{p}_e2el_ms": float(np.percentile(ms, p)) for p in PERCENTILES},
    }


async def step_totals(client: httpx.AsyncClient) -> tuple[float, float] | None:
    """Return the total number of images in engine steps and the number of steps, from `/metrics`; None without them."""
    import httpx

    try:
        response = await client.get("/metrics")
        response.raise_for_status()
    except httpx.HTTPError:
        return None
    totals = dict.fromkeys(("sum", "count"), 0.0)
    found = False
    for line in response.text.splitlines():
        name, _, value = line.rpartition(" ")
        for what in totals:
            if name.split("{")[0] == f"slideredit_step_batch_size_{what}":
                totals[what] += float(value)
                found = True
    return (totals["sum"], totals["count"]) if found else None


@contextmanager
def local_server(*options: str) -> Iterator[tuple[str, int]]:
    """Start a server in a separate process on a free port, yield its URL and process id, and stop it on exit.

    Args:
        *options: Arguments of `slideredit-rt serve`; the embedded engine is served unless the first one names another.

    Raises:
        SliderEditError: The server did not start.
    """
    command = [sys.executable, "-m", "slideredit_rt.cli", "serve", *options, "--port", "0", "--json", "--quiet"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                process.wait(_STOP_SECONDS)
                log.seek(0)
                raise SliderEditError(f"the server did not start: {log.read().decode(errors='replace').strip()[-500:]}")
            yield str(json.loads(line)["url"]), process.pid
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def provenance() -> dict[str, Any]:
    """Return the date, the versions and, in a git checkout, the commit of a result."""
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": {
            "slideredit-rt": __version__,
            **{name: version(name) for name in ("torch", "onnxruntime", "fastapi", "uvicorn", "httpx")},
        },
    }


def bench_serve(
    load: Load, *, base_url: str | None = None, engine: Path | None = None, api_key: str | None = None
) -> dict[str, Any]:
    """Measure a load on a server.

    Args:
        load: Requests to send.
        base_url: URL of the server; None starts one for the measurement.
        engine: Engine of that server; None uses the embedded editor.
        api_key: API key of the server.

    Returns:
        The result of `measure` with the load, the server, date, versions and commit.
    """
    with nullcontext((base_url, 0)) if base_url else local_server(*([] if engine is None else [str(engine)])) as (url, _):

        async def run() -> dict[str, Any]:
            async with open_client(url, api_key) as client:
                return await measure(client, load)

        result = asyncio.run(run())
    rate = load.request_rate if math.isfinite(load.request_rate) else "inf"
    described = asdict(load) | {"request_rate": rate, "image": load.image and load.image.name}
    return {**provenance(), "endpoint": ENDPOINT, "server": base_url or "started for this run", **described, **result}


def table(result: dict[str, Any]) -> list[str]:
    """Format the result as text, one line per figure."""
    lines = [
        ("successful requests", f"{result['completed']}"),
        ("failed requests", f"{result['failed']}" + "".join(f", {n} × {e}" for e, n in result["errors"].items())),
        ("duration (s)", f"{result['duration']:.2f}"),
        ("request throughput (requests/s)", f"{result['request_throughput']:.2f}"),
        ("mean step batch size", "-" if result["step_batch_size"] is None else f"{result['step_batch_size']:.2f}"),
    ]
    for name, part in (("", result), ("preview ", result.get("preview", {}))):
        for key in ("mean", "median", *(f"p{p}" for p in PERCENTILES)):
            if f"{key}_e2el_ms" in part:
                lines.append((f"{name}{key} e2el (ms)", f"{part[f'{key}_e2el_ms']:.1f}"))
    return [f"{name:<34} {value:>12}" for name, value in lines]


def default_file(result: dict[str, Any]) -> str:
    """Return the default file name of `--save-result`."""
    stamp = result["date"].translate(str.maketrans("", "", ":-+"))
    return f"serve-{result['request_rate']}qps-concurrency{result['max_concurrency']}-{stamp}.json"
