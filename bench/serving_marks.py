"""Effect of step-level batching on serving: `make bench-serve` writes `results/serving.json` and `results/serving.md`.

Cells are measured in turns and compared within a round, because a machine's speed drifts. A ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from slideredit_rt.bench.serve import Answer, Load, bodies_of, latencies, local_server, measure, open_client, provenance, send
from slideredit_rt.serving.service import PREVIEWS_COME

RESULTS = Path(__file__).parent / "results" / "serving.json"
CONCURRENT = 16
BACKGROUND = 8
"""Number of concurrent full edits while previews are measured."""

# Cells of a round send the same requests, which must not be answered from the cache of latents.
_SERVERS = {
    "batching": ("--no-latent-cache",),
    "no batching": ("--no-latent-cache", "--no-step-batching"),
    "no cache": ("--cache-mib", "0"),
}
# Server, sliders and concurrency of each cell.
_CELLS: dict[str, tuple[str, Any, int]] = {
    "mixed sliders": ("batching", "mixed", CONCURRENT),
    "equal sliders": ("batching", "equal", CONCURRENT),
    "one at a time": ("batching", "mixed", 1),
    "step batching off": ("no batching", "mixed", CONCURRENT),
    "cache off": ("no cache", "mixed", CONCURRENT),
}
_PREVIEW_CELLS = ("preview alone", "preview beside full edits")
# Numerator and denominator of each throughput ratio, and its lower limit.
_THROUGHPUT_RATIOS: dict[str, tuple[str, str, float | None]] = {
    "mixed sliders / equal sliders": ("mixed sliders", "equal sliders", 0.98),
    "mixed sliders / one at a time": ("mixed sliders", "one at a time", 1.5),
    "mixed sliders / step batching off": ("mixed sliders", "step batching off", None),
    "mixed sliders / cache off": ("mixed sliders", "cache off", None),
}
_PREVIEW_RATIO = "preview p95 beside full edits / alone"
_PREVIEW_MARK = 3.0


@dataclass(frozen=True)
class Size:
    """Size of the measurement.

    Attributes:
        rounds: Number of rounds.
        requests: Requests per cell and round.
        previews: Previews per cell and round.
        steps: Denoising steps of a full edit.
    """

    rounds: int = 5
    requests: int = 192
    previews: int = 40
    steps: int = 12


async def send_previews(client: httpx.AsyncClient, count: int, seed: int) -> list[Answer]:
    """Send previews one after the other, as the page does during a drag, with the server's default number of steps."""
    bodies = bodies_of(Load(num_prompts=count, num_warmups=0, preview_share=1.0, seed=seed))
    return [await send(client, body) for body in bodies]


async def preview_cells(client: httpx.AsyncClient, size: Size, seed: int) -> dict[str, list[Answer]]:
    """Measure previews alone, then with full edits running all the time."""
    alone = await send_previews(client, size.previews, seed)
    full = bodies_of(Load(num_prompts=size.requests, num_warmups=0, steps=size.steps, seed=seed + 1))

    async def keep_busy(bodies: Sequence[dict[str, Any]]) -> None:
        while True:
            for body in bodies:
                answer = await send(client, body)
                assert answer.error is None, answer.error

    tasks = [asyncio.create_task(keep_busy(full[i::BACKGROUND] or full)) for i in range(BACKGROUND)]
    try:
        await asyncio.sleep(1.0)  # so that the edits are at different steps
        beside = await send_previews(client, size.previews, seed)
        if (ended := next((task for task in tasks if task.done()), None)) is not None:
            ended.result()
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    return dict(zip(_PREVIEW_CELLS, (alone, beside), strict=True))


async def measure_rounds(
    urls: dict[str, str], size: Size
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[list[Answer]]]]:
    """Measure every cell in every round, and return the results of `measure` and the answers of the previews."""
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in _CELLS}
    previews: dict[str, list[list[Answer]]] = {name: [] for name in _PREVIEW_CELLS}
    async with AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(open_client(url)) for name, url in urls.items()}
        for client in clients.values():
            # Warm up: run every batch shape and encode every image and prompt once.
            await measure(client, Load(num_prompts=2 * CONCURRENT, max_concurrency=CONCURRENT, steps=2, num_warmups=0))
        for number in range(size.rounds):
            order = [*_CELLS, "previews"]
            random.Random(number).shuffle(order)
            for name in order:
                if name == "previews":
                    for cell, answers in (await preview_cells(clients["batching"], size, number)).items():
                        previews[cell].append(answers)
                    # After a preview, full edits run in smaller batches for a while. Wait until that ends.
                    await asyncio.sleep(PREVIEWS_COME + 1)
                    continue
                server, sliders, concurrent = _CELLS[name]
                load = Load(
                    num_prompts=size.requests,
                    max_concurrency=concurrent,
                    num_warmups=2,
                    sliders=sliders,
                    steps=size.steps,
                    seed=number,
                )
                cells[name].append(await measure(clients[server], load))
    return cells, previews


def summarise(cells: dict[str, list[dict[str, Any]]], previews: dict[str, list[list[Answer]]]) -> dict[str, Any]:
    """Return medians over rounds, and ratios within rounds with their marks (see `verdict`)."""
    failed = sum(r["failed"] for results in cells.values() for r in results)
    failed += sum(answer.error is not None for rounds in previews.values() for answers in rounds for answer in answers)
    table: dict[str, dict[str, Any]] = {}
    for name, results in cells.items():
        keys = ("request_throughput", "mean_e2el_ms", "p95_e2el_ms", "step_batch_size")
        table[name] = {"concurrency": _CELLS[name][2], **{key: statistics.median(r[key] for r in results) for key in keys}}
    p95 = {
        name: [latencies([a.seconds for a in answers])["p95_e2el_ms"] for answers in rounds]
        for name, rounds in previews.items()
    }
    for name, rounds in previews.items():
        found = latencies([a.seconds for answers in rounds for a in answers])
        table[name] = {"concurrency": 1, "mean_e2el_ms": found["mean_e2el_ms"], "p95_e2el_ms": found["p95_e2el_ms"]}
    ratios = {}
    for name, (of, to, mark) in _THROUGHPUT_RATIOS.items():
        by_round = [a["request_throughput"] / b["request_throughput"] for a, b in zip(cells[of], cells[to], strict=True)]
        ratios[name] = _ratio(by_round, mark, at_least=True)
    alone, beside = _PREVIEW_CELLS
    ratios[_PREVIEW_RATIO] = _ratio(
        [b / a for a, b in zip(p95[alone], p95[beside], strict=True)], _PREVIEW_MARK, at_least=False
    )
    return {"failed": failed, "cells": table, "ratios": ratios}


def _ratio(by_round: list[float], mark: float | None, *, at_least: bool) -> dict[str, Any]:
    value = statistics.median(by_round)
    ratio = {"value": value, "by_round": by_round}
    return ratio if mark is None else ratio | {"mark": mark, "at_least": at_least}


def measure_marks(size: Size) -> dict[str, Any]:
    """Start the servers, measure, and describe the machine."""
    with ExitStack() as stack:
        urls = {name: stack.enter_context(local_server(*options))[0] for name, options in _SERVERS.items()}
        cells, previews = asyncio.run(measure_rounds(urls, size))
    options = f"--rounds {size.rounds} --requests {size.requests} --previews {size.previews}"
    return {
        "command": f"make bench-serve BENCH_OPTIONS='{options}'",
        **provenance(),
        "machine": f"{platform.machine()}, {os.cpu_count()} threads",
        "size": vars(size),
        "background": BACKGROUND,
        **summarise(cells, previews),
    }


def verdict(ratio: dict[str, Any]) -> str:
    """Return the mark of a ratio and whether all rounds met or missed it. It is not decided if rounds disagree."""
    if "mark" not in ratio:
        return ""
    rounds = {value >= ratio["mark"] if ratio["at_least"] else value <= ratio["mark"] for value in ratio["by_round"]}
    word = "not decided, rounds on both sides" if len(rounds) == 2 else "met" if rounds == {True} else "missed"
    return f"{'≥' if ratio['at_least'] else '≤'} {ratio['mark']:g}, {word}"


def markdown(result: dict[str, Any]) -> str:
    """Return the result as two Markdown tables."""
    size = result["size"]
    lines = [
        f"Embedded editor, {size['steps']} steps, {result['machine']}; medians of {size['rounds']} rounds, each of "
        f"{size['requests']} edits and {size['previews']} previews; {result['date'][:10]} (`{result['command']}`).",
        "",
        "| | concurrent | edits/s | mean ms | p95 ms | images in a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, cell in result["cells"].items():
        figures = [cell.get(key) for key in ("request_throughput", "mean_e2el_ms", "p95_e2el_ms", "step_batch_size")]
        shown = [("–" if value is None else f"{value:.{digits}f}") for value, digits in zip(figures, (1, 0, 0, 1), strict=True)]
        lines.append(f"| {name} | {cell['concurrency']} | {' | '.join(shown)} |")
    lines += ["", "| ratio, within rounds | median | least | most | mark |", "|---|---|---|---|---|"]
    for name, ratio in result["ratios"].items():
        by_round = ratio["by_round"]
        lines.append(f"| {name} | {ratio['value']:.2f} | {min(by_round):.2f} | {max(by_round):.2f} | {verdict(ratio)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    defaults = Size()
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(default: %(default)s)")
    args = parser.parse_args()
    # Turn SIGTERM into an exception, so that the servers are stopped as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = measure_marks(replace(defaults, **{name: getattr(args, name) for name in vars(defaults)}))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(markdown(result))
    sys.stdout.write(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
