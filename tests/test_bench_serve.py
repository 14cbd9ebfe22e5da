"""The load generator: what it sends, what it counts, and the comparison that `make bench-serve` writes."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import serving

from slideredit_rt.bench.serve import Load, bodies_of, measure, open_client
from slideredit_rt.bench.serving_marks import Size, markdown, measure_rounds, summarise, verdict
from slideredit_rt.cli import main
from slideredit_rt.errors import SliderEditError


@pytest.fixture(scope="module")
def url(engines: dict[str, Path]) -> Iterator[str]:
    with serving(engines["st"], api_key="secret", latent_cache=False) as address:
        yield address


def run(url: str, load: Load, key: str = "secret") -> dict[str, Any]:
    async def measured() -> dict[str, Any]:
        async with open_client(url, key) as client:
            return await measure(client, load)

    return asyncio.run(measured())


def test_mixed_and_equal_requests_differ_in_their_sliders_alone() -> None:
    mixed, equal = (bodies_of(Load(num_prompts=20, num_warmups=0, sliders=sliders, seed=3)) for sliders in ("mixed", "equal"))
    assert mixed == bodies_of(Load(num_prompts=20, num_warmups=0, seed=3))
    assert len({json.dumps(body["sliders"]) for body in mixed}) > 15
    assert {len(body["sliders"]) for body in mixed} == {1, 2}
    assert len({json.dumps(body["sliders"]) for body in equal}) == 1
    for body in (*mixed, *equal):
        del body["sliders"]
    assert mixed == equal


def test_closed_loop_result_has_the_keys_of_vllm_and_adds_up(url: str) -> None:
    result = run(url, Load(num_prompts=8, max_concurrency=4, num_warmups=2, steps=2))
    assert (result["completed"], result["failed"], result["errors"]) == (8, 0, {})
    assert result["request_throughput"] == pytest.approx(8 / result["duration"])
    assert result["median_e2el_ms"] <= result["p90_e2el_ms"] <= result["p95_e2el_ms"] <= result["p99_e2el_ms"]
    # No request can take longer than all of them.
    assert 0 < result["mean_e2el_ms"] < 1000 * result["duration"]
    # At least as many rows as one request brings, at most as many as there can be together.
    assert 1 <= result["step_batch_size"] <= 4


def test_open_loop_sends_at_its_own_times(url: str) -> None:
    """Ten requests a second, however fast answers come."""
    result = run(url, Load(num_prompts=6, request_rate=10, num_warmups=1, steps=1))
    assert result["completed"] == 6
    assert result["duration"] > 0.2


def test_previews_are_told_apart(url: str) -> None:
    result = run(url, Load(num_prompts=4, max_concurrency=2, num_warmups=0, preview_share=1.0))
    assert result["preview"]["completed"] == 4
    assert result["preview"]["p95_e2el_ms"] == result["p95_e2el_ms"]


def test_failures_are_counted_and_make_no_throughput(url: str) -> None:
    result = run(url, Load(num_prompts=3, num_warmups=0), key="wrong")
    assert (result["completed"], result["failed"], result["errors"]) == (0, 3, {"401": 3})
    assert result["request_throughput"] == 0
    assert "mean_e2el_ms" not in result
    with pytest.raises(SliderEditError, match=r"failed a warm-up request \(401: .*the API key is wrong"):
        run(url, Load(num_prompts=3), key="wrong")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_prompts": 0}, "--num-prompts is 0; pass at least 1"),
        ({"max_concurrency": 0}, "--max-concurrency is 0"),
        ({"request_rate": 0.0}, "--request-rate is 0"),
        ({"request_rate": math.nan}, "--request-rate is nan"),
        ({"preview_share": 1.5}, "--preview-share is 1.5"),
    ],
)
def test_loads_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SliderEditError, match=sentence):
        Load(**options)


def test_command_prints_a_table_and_saves_the_result(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDEREDIT_API_KEY", "secret")
    command = ["bench", "serve", "--base-url", url, "--num-prompts", "2", "--num-warmups", "0", "--steps", "1"]
    assert main([*command, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "r.json").read_text())
    assert f"{saved['request_throughput']:.2f}" in printed
    assert {"date", "versions", "commit", "num_prompts", "request_rate", "max_concurrency"} <= saved.keys()
    assert saved["request_rate"] == "inf"
    assert main([*command, "--num-prompts", "0"]) == 2
    assert main([*command, "--picture", str(tmp_path / "none.png")]) == 2


def test_a_small_comparison(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All servers are one here, so that its figures mean nothing; how they are computed is what is tested."""
    monkeypatch.setattr("slideredit_rt.bench.serving_marks.open_client", lambda url: open_client(url, "secret"))
    urls = dict.fromkeys(("batching", "no batching", "no cache"), url)
    size = Size(rounds=2, requests=3, previews=2, steps=1)
    cells, previews = asyncio.run(measure_rounds(urls, size))
    result = summarise(cells, previews)
    assert result["failed"] == 0
    ratio = result["ratios"]["mixed sliders / equal sliders"]
    assert ratio["by_round"] == [
        mixed["request_throughput"] / equal["request_throughput"]
        for mixed, equal in zip(cells["mixed sliders"], cells["equal sliders"], strict=True)
    ]
    assert ratio["value"] == statistics.median(ratio["by_round"])
    assert (ratio["mark"], ratio["at_least"]) == (0.98, True)
    preview = result["ratios"]["preview p95 beside full edits / alone"]
    assert (preview["mark"], preview["at_least"]) == (3, False)
    page = markdown({"command": "make bench-serve", "date": "2026-11-24", "machine": "m", "size": vars(size), **result})
    for name in (*result["cells"], *result["ratios"]):
        assert f"| {name} |" in page


@pytest.mark.parametrize(
    ("by_round", "word"), [([1.0, 1.2], "met"), ([0.5, 0.9], "missed"), ([0.5, 1.0, 2.0], "not decided, rounds on both sides")]
)
def test_a_mark_is_met_when_every_round_meets_it(by_round: list[float], word: str) -> None:
    assert verdict({"by_round": by_round, "mark": 0.98, "at_least": True}) == f"≥ 0.98, {word}"
    assert verdict({"by_round": [-v for v in by_round], "mark": -0.98, "at_least": False}) == f"≤ -0.98, {word}"
    assert verdict({"by_round": by_round}) == ""
