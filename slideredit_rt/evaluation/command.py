"""`slideredit-rt evaluate`: which systems a base and its adapters allow, and one run of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.report import write_report
from slideredit_rt.evaluation.run import Benchmark, BenchmarkConfig
from slideredit_rt.evaluation.systems import System
from slideredit_rt.evaluation.systems.guidance import ExplicitGuidance, ImplicitGuidance
from slideredit_rt.evaluation.systems.merged_lora import MergedLoRA
from slideredit_rt.evaluation.systems.pad_interpolation import PadInterpolation
from slideredit_rt.evaluation.systems.slideredit import GloballySelective, SelectiveToken
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import family_of
from slideredit_rt.files import folder_fingerprint

SYSTEMS: Mapping[str, type[System]] = {
    s.name: s for s in (SelectiveToken, GloballySelective, PadInterpolation, ImplicitGuidance, ExplicitGuidance, MergedLoRA)
}


def run_evaluation(
    base: str,
    adapters: Sequence[str],
    systems: Sequence[str],
    config: BenchmarkConfig,
    out: Path,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Build one ONNX Runtime engine per kind of adapter, run the benchmark on shapes scenes, write the report.

    Args:
        base: `shapes-kontext` or another checkpoint that edits shapes scenes.
        adapters: one ST adapter, one GST adapter, or both.
        systems: names from `SYSTEMS`; empty for all that the adapters allow.
        out: folder of the run; a killed run continues in it.

    Returns:
        The contents of `report.json`.

    Raises:
        SliderEditError: an unknown system, or one whose adapter is missing.
    """
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise SliderEditError(f"{unknown[0]!r} is no system of this benchmark; choose among {', '.join(SYSTEMS)}")
    folder = resolve_base(base)
    family = family_of(folder)
    given: dict[str, tuple[str, Any]] = {}
    for source in adapters:
        adapter = load_adapter(source, family)
        if adapter.kind in given:
            raise SliderEditError(
                f"adapters {given[adapter.kind][0]!r} and {source!r} are both {adapter.kind.upper()}; "
                "give one of each kind and evaluate the other in a run of its own"
            )
        given[adapter.kind] = (source, adapter)

    @cache
    def engine(kind: str) -> SliderEditor:
        path = out / "engines" / kind
        # The engine of a killed run is built anew: it takes seconds, and its adapter may have changed since.
        build_engine(base, given[kind][0], path, overwrite=True, progress=False)
        return SliderEditor.from_engine(path)

    makers: dict[str, Callable[[], System]] = {}
    if "st" in given:
        makers |= {
            "st": lambda: SelectiveToken(engine("st")),
            "pad-interpolation": lambda: PadInterpolation(SliderEditor.from_pretrained(base, given["st"][1])),
        }
    if "gst" in given:
        makers |= {
            "gst": lambda: GloballySelective(engine("gst")),
            "merged-lora": lambda: MergedLoRA(family, family.load_pipeline(folder), given["gst"][1]),
        }
    shared = "st" if "st" in given else "gst"
    makers["explicit-cfg"] = lambda: ExplicitGuidance(engine(shared))
    if family.guidance_scale is not None:
        makers["implicit-cfg"] = lambda: ImplicitGuidance(engine(shared))
    wanted = list(systems) or [name for name in SYSTEMS if name in makers]
    if missing := [name for name in wanted if name not in makers]:
        needs = "embedded guidance" if missing[0] == "implicit-cfg" else "an adapter of its kind (--adapter)"
        raise SliderEditError(f"system {missing[0]!r} needs {needs}; the adapters given are {', '.join(given) or 'none'}")
    if not given:
        raise SliderEditError("no adapter was given; pass --adapter, such as shapes-st")
    fingerprints = {"base": folder_fingerprint(folder)} | {kind: adapter.fingerprint for kind, (_, adapter) in given.items()}
    reference = next(name for name in ("st", "gst") if name in makers)
    # The plain edit is the reference system's own at strength 1, so it has to be there even if it is not compared.
    chosen = {name: makers[name] for name in wanted}
    benchmark = Benchmark(chosen, makers[reference], config, out, fingerprints)
    rows = benchmark.run(progress=progress)
    about = {
        "base": base,
        "adapters": {kind: source for kind, (source, _) in given.items()},
        "fingerprints": fingerprints,
        "settings": benchmark.settings["config"],
        "how": {name: f"{SYSTEMS[name].how}; the knob is {SYSTEMS[name].knob}" for name in wanted},
        "searched_ranges": {name: [list(ends) for ends in SYSTEMS[name].ranges] for name in wanted},
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "diffusers", "peft", "scipy")},
    }
    return write_report(rows, out, about)
