"""`slideredit-rt evaluate`: which systems a base, its engines and adapters allow, on which pictures, and one run of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.assets import EMBEDDED_BASE, resolve_base, resolve_offsets
from slideredit_rt.checkpoint import fingerprint_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Dataset
from slideredit_rt.evaluation.pictures import PictureOptions, open_pictures
from slideredit_rt.evaluation.report import write_report
from slideredit_rt.evaluation.run import Benchmark, BenchmarkConfig, Contender
from slideredit_rt.evaluation.shapes import ShapesScenes
from slideredit_rt.evaluation.systems import System
from slideredit_rt.evaluation.systems.attribute_offsets import OffsetControl
from slideredit_rt.evaluation.systems.concept_sliders import ConceptSliders
from slideredit_rt.evaluation.systems.guidance import ExplicitGuidance, ImplicitGuidance
from slideredit_rt.evaluation.systems.merged_lora import MergedLoRA
from slideredit_rt.evaluation.systems.pad_interpolation import PadInterpolation
from slideredit_rt.evaluation.systems.slideredit import GloballySelective, SelectiveToken
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import Family, family_of
from slideredit_rt.files import folder_fingerprint, sha256
from slideredit_rt.shapes.world import ALL_INSTRUCTIONS, find_instruction
from slideredit_rt.training.attribute_offsets import load_offsets

SYSTEMS: Mapping[str, type[System]] = {
    s.name: s
    for s in (
        SelectiveToken,
        GloballySelective,
        PadInterpolation,
        ImplicitGuidance,
        ExplicitGuidance,
        MergedLoRA,
        ConceptSliders,
        OffsetControl,
    )
}


@dataclass(frozen=True)
class Given:
    """What `slideredit-rt evaluate` was given to compare.

    Attributes:
        base: checkpoint that every adapter is for.
        adapters: an engine is built for each.
        engines: folders written by `slideredit-rt build`, of the same base.
        systems: names from `SYSTEMS`; empty for all that the adapters and engines allow.
        concepts: a bank of concept sliders, from `slideredit-rt train concepts`. None takes the embedded one for the embedded
            base on scenes of its own world, and none elsewhere.
        offsets: a file of attribute offsets, from `slideredit-rt train offsets`; None as for `concepts`.
    """

    base: str
    adapters: Sequence[str] = ()
    engines: Sequence[Path] = ()
    systems: Sequence[str] = ()
    threads: int | None = None
    concepts: str | None = None
    offsets: str | None = None


@dataclass(frozen=True)
class _Source:
    """One engine to be, or one that is there: its kind, where it comes from, and how it is opened."""

    kind: str
    stem: str
    origin: str
    fingerprint: str
    open: Callable[[], SliderEditor]


@dataclass(frozen=True)
class _Rival:
    """A system that was trained beforehand: how it is made, and what from."""

    contender: Contender
    origin: str
    fingerprint: str


def run_evaluation(
    given: Given,
    config: BenchmarkConfig,
    out: Path,
    *,
    pictures: PictureOptions | None = None,
    instructions: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Build an ONNX Runtime engine per adapter, run the benchmark, write the report.

    Args:
        given: what is compared.
        out: folder of the run; a killed run continues in it.
        pictures: pictures and scorers; None takes shapes scenes, which a base like `shapes-kontext` edits.
        instructions: of the shapes scenes; None takes all of that world.

    Returns:
        The contents of `report.json`.

    Raises:
        SliderEditError: an unknown system or scorer, a system whose adapter is missing, pictures that cannot be used.
    """
    if unknown := [name for name in given.systems if name not in SYSTEMS]:
        raise SliderEditError(f"{unknown[0]!r} is no system of this benchmark; choose among {', '.join(SYSTEMS)}")
    folder = resolve_base(given.base)
    family = family_of(folder)
    adapters = [load_adapter(source, family) for source in given.adapters]
    sources = _sources(given, adapters, out)
    if folder == resolve_base(EMBEDDED_BASE) and pictures is None:
        given = replace(given, concepts=given.concepts or "shapes-concepts", offsets=given.offsets or "shapes-offsets")
    contenders = _contenders(given, family, folder, adapters, sources)
    rivals = _rivals(given, family, sources, out)
    contenders |= {name: rival.contender for name, rival in rivals.items()}
    chosen = {name: c for name, c in contenders.items() if not given.systems or c.system.name in given.systems}
    found = {c.system.name for c in chosen.values()}
    if missing := [name for name in given.systems if name not in found]:
        raise SliderEditError(f"system {missing[0]!r} needs {_need(missing[0])}; what was given allows {', '.join(contenders)}")
    if pictures is None:
        known = ALL_INSTRUCTIONS if instructions is None else [find_instruction(text) for text in instructions]
        dataset: Dataset = ShapesScenes(known)
        data = {"shapes": hashlib.sha256("\n".join(i.text for i in known).encode()).hexdigest()}
    else:
        dataset = open_pictures(pictures, family, folder)
        data = {"images": folder_fingerprint(pictures.images), "prompts": sha256(pictures.prompts)}
    trained = {name: rival for name, rival in rivals.items() if name in chosen}
    fingerprints = {f"base {name}": value for name, value in fingerprint_base(folder).items()}
    fingerprints |= {s.stem: s.fingerprint for s in sources} | data
    fingerprints |= {name: rival.fingerprint for name, rival in trained.items()}
    # The plain edit is the reference system's own at strength 1, so it has to be there even if it is not compared.
    reference = next(c for c in contenders.values() if issubclass(c.system, SelectiveToken))
    benchmark = Benchmark(chosen, reference.make, dataset, config, out, fingerprints)
    rows = benchmark.run(progress=progress)
    compared = {c.system.name: c.system for c in chosen.values()}
    about = {
        "base": given.base,
        "sources": {s.stem: s.origin for s in sources} | {name: rival.origin for name, rival in trained.items()},
        "fingerprints": fingerprints,
        "settings": benchmark.settings["config"],
        "instructions": "all" if instructions is None else list(instructions),
        "how": {name: f"{system.how}; the knob is {system.knob}" for name, system in compared.items()},
        "searched_ranges": {name: [list(ends) for ends in system.ranges] for name, system in compared.items()},
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "diffusers", "peft", "scipy")},
    }
    return write_report(rows, out, about)


def _sources(given: Given, adapters: Sequence[Adapter], out: Path) -> list[_Source]:
    """An engine per adapter, built when it is first needed, and the engines that are there."""
    sources = []
    for source, adapter in zip(given.adapters, adapters, strict=True):
        if adapter.members:
            raise SliderEditError(
                f"adapter {source!r} is a bank; give its members' own files, or concept sliders as --concepts"
            )
        stem = _safe(Path(source).stem)
        # The curve is no part of the weights, and moves the pictures all the same.
        fingerprint = f"{adapter.fingerprint} {json.dumps(adapter.curve.to_json())}"
        open_it = cache(partial(_build, given, adapter, out / "engines" / stem))
        sources.append(_Source(adapter.kind, stem, source, fingerprint, open_it))
    for engine in given.engines:
        manifest = read_manifest(engine)
        if manifest.adapter is None or manifest.kind is None:
            raise SliderEditError(f"engine {str(engine)!r} was built without an adapter and has no sliders; leave it out")
        if manifest.members:
            raise SliderEditError(f"engine {str(engine)!r} has a bank of adapters; evaluate its members' own files")
        open_it = cache(partial(SliderEditor.from_engine, engine, given.base, threads=given.threads))
        stem = _safe(engine.resolve().name)
        fingerprint = f"{manifest.adapter['fingerprint']} {json.dumps(manifest.curve.to_json())}"
        sources.append(_Source(manifest.kind, stem, str(engine), fingerprint, open_it))
    if not sources:
        raise SliderEditError("nothing to evaluate was given; pass --adapter, such as shapes-st, or --engine")
    if twice := [stem for stem, count in Counter(s.stem for s in sources).items() if count > 1]:
        raise SliderEditError(f"two adapters or engines are called {twice[0]!r}; rename one, since systems go by these names")
    return sources


def _build(given: Given, adapter: Adapter, path: Path) -> SliderEditor:
    # The engine of a killed run is built anew: it takes seconds, and its adapter may have changed since.
    build_engine(given.base, adapter, path, overwrite=True, progress=False)
    return SliderEditor.from_engine(path, given.base, threads=given.threads)


def _rivals(given: Given, family: Family, sources: Sequence[_Source], out: Path) -> dict[str, _Rival]:
    """Those that something was given for, by name."""
    found = {}
    if given.concepts is not None:
        bank = load_adapter(given.concepts, family)
        open_it = partial(_build, given, bank, out / "engines" / ConceptSliders.name)
        concepts = Contender(ConceptSliders, lambda: ConceptSliders(open_it()))
        found[ConceptSliders.name] = _Rival(concepts, given.concepts, bank.fingerprint)
    if given.offsets is not None:
        path = resolve_offsets(given.offsets)
        offsets = load_offsets(path, family)
        control = Contender(OffsetControl, lambda: OffsetControl(sources[0].open(), offsets))
        found[OffsetControl.name] = _Rival(control, given.offsets, sha256(path))
    return found


def _safe(name: str) -> str:
    """A name that can be part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)


def _contenders(
    given: Given, family: Family, folder: Path, adapters: Sequence[Adapter], sources: Sequence[_Source]
) -> dict[str, Contender]:
    """What can be compared, by name: a slider system by its kind, or by its adapter or engine where there are several."""
    kinds: Mapping[str, Callable[[SliderEditor], System]] = {"st": SelectiveToken, "gst": GloballySelective}
    counts = Counter(s.kind for s in sources)
    found = {}
    for source in sources:

        def make(source: _Source = source) -> System:
            return kinds[source.kind](source.open())

        found[source.kind if counts[source.kind] == 1 else source.stem] = Contender(SYSTEMS[source.kind], make)
    found = dict(sorted(found.items(), key=lambda item: list(SYSTEMS).index(item[1].system.name)))
    first = {kind: next((a for a in adapters if a.kind == kind), None) for kind in kinds}
    st, gst = first["st"], first["gst"]
    if st is not None:
        eager = partial(SliderEditor.from_pretrained, given.base, st)
        found["pad-interpolation"] = Contender(PadInterpolation, lambda: PadInterpolation(eager()))
    if family.guidance_scale is not None:
        found["implicit-cfg"] = Contender(ImplicitGuidance, lambda: ImplicitGuidance(sources[0].open()))
    found["explicit-cfg"] = Contender(ExplicitGuidance, lambda: ExplicitGuidance(sources[0].open()))
    if gst is not None:
        found["merged-lora"] = Contender(MergedLoRA, lambda: MergedLoRA(family, family.load_pipeline(folder), gst))
    return found


def _need(system: str) -> str:
    return {
        "implicit-cfg": "a base with embedded guidance",
        "pad-interpolation": "an ST adapter (--adapter)",
        "merged-lora": "a GST adapter (--adapter)",
        "concept-sliders": "training on this base and its instructions (slideredit-rt train concepts, then --concepts)",
        "attribute-offsets": "training on this base and its instructions (slideredit-rt train offsets, then --offsets)",
    }.get(system, "an adapter or an engine of its kind (--adapter, --engine)")
