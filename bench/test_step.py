"""One denoising step of the embedded editor: engine, eager torch, and an engine without sliders (`make bench`).

All candidates are timed in one process with the same number of threads, in turns, because the speed of a shared machine
drifts by more than the differences to be measured.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, open_engine
from slideredit_rt.export.build import build_engine
from slideredit_rt.settings import RunSettings
from slideredit_rt.shapes.world import held_out_examples, scene_image

THREADS = 2
RUN = RunSettings(threads=THREADS)
RESULTS = Path(__file__).parent / "results"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    """Return one step per candidate, at 24 text rows, 64 + 64 image rows and batch 1, with two sliders for ST."""
    torch.set_num_threads(THREADS)
    root = tmp_path_factory.mktemp("bench")
    runs: dict[str, Callable[[], Any]] = {}
    example = held_out_examples(1, 2)[0]
    texts = [i.text for i in example.instructions]
    build_engine("shapes-kontext", None, root / "frozen", progress=False)
    _, frozen = open_engine(root / "frozen", RUN)
    for kind in ("st", "gst"):
        build_engine("shapes-kontext", f"shapes-{kind}", root / kind, progress=False)
        engine = SliderEditor.from_engine(root / kind, run=RUN)
        eager = SliderEditor.from_pretrained("shapes-kontext", f"shapes-{kind}")
        prepared = engine.prepare(scene_image(example), texts if kind == "st" else texts[:1], prompt=example.prompt)
        alpha = torch.full((1, len(prepared.instructions)), 0.5)
        inputs = engine.family.batch_inputs(engine.config, prepared.conditioning, alpha, prepared.token_mask[None])
        inputs["timestep"].fill_(0.5)
        plain = {k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")}
        runs[f"engine {kind}"] = partial(engine.engine, inputs)
        runs[f"eager {kind}"] = partial(eager.engine, inputs)
        runs["engine frozen"] = partial(frozen, plain)
        # The lowering that is not the default for this kind, and the adapter as an input.
        other = {"st": "folded", "gst": "native"}[kind]
        build_engine("shapes-kontext", f"shapes-{kind}", root / other, BuildSettings(lowering=other), progress=False)
        runs[f"engine {kind}, {other}"] = partial(open_engine(root / other, RUN)[1], inputs)
        with_inputs = BuildSettings(adapter_inputs=True)
        build_engine("shapes-kontext", f"shapes-{kind}", root / f"{kind}-inputs", with_inputs, progress=False)
        runs[f"engine {kind}, inputs"] = partial(SliderEditor.from_engine(root / f"{kind}-inputs", run=RUN).engine, inputs)
    return runs


@pytest.mark.parametrize(
    "name",
    [
        "engine frozen",
        "engine st",
        "engine st, folded",
        "engine st, inputs",
        "engine gst",
        "engine gst, native",
        "engine gst, inputs",
        "eager st",
        "eager gst",
    ],
)
def test_step(benchmark: Any, runs: dict[str, Callable[[], Any]], name: str) -> None:
    benchmark.pedantic(runs[name], warmup_rounds=10, rounds=60, iterations=1)


def measure_in_turns(runs: dict[str, Callable[[], Any]], turns: int = 15) -> dict[str, float]:
    """Return the median milliseconds of each candidate, measured in alternating turns of 13 calls.

    A pause before each turn lets the previous candidate's thread pool stop spinning. The first three calls do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            time.sleep(0.1)
            for call in range(13):
                start = time.perf_counter()
                run()
                if call >= 3:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def test_ratios(runs: dict[str, Callable[[], Any]]) -> None:
    """Check marks: engine / eager at most 0.8, two sliders / none at most 1.10, adapter inputs / constants at most 1.05."""
    median = measure_in_turns(runs)
    ratios = {
        "engine st / eager st": median["engine st"] / median["eager st"],
        "engine gst / eager gst": median["engine gst"] / median["eager gst"],
        "engine st / engine frozen": median["engine st"] / median["engine frozen"],
        "engine gst / engine frozen": median["engine gst"] / median["engine frozen"],
        "engine st, folded / engine st": median["engine st, folded"] / median["engine st"],
        "engine gst, native / engine gst": median["engine gst, native"] / median["engine gst"],
        "engine st, inputs / engine st": median["engine st, inputs"] / median["engine st"],
        "engine gst, inputs / engine gst, native": median["engine gst, inputs"] / median["engine gst, native"],
    }
    result = {
        "command": "make bench",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {THREADS} threads",
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "diffusers")},
        "median_ms": {k: round(v, 3) for k, v in median.items()},
        "ratios": {k: round(v, 3) for k, v in ratios.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    assert ratios["engine st / eager st"] <= 0.8
    assert ratios["engine gst / eager gst"] <= 0.8
    assert ratios["engine st, inputs / engine st"] <= 1.05
    assert ratios["engine gst, inputs / engine gst, native"] <= 1.05
    assert ratios["engine st / engine frozen"] <= 1.10
