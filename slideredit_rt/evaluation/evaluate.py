"""The evaluation: select the systems and images of a setup, run the benchmark and write the report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

from slideredit_rt.assets import choose_world, resolve_base
from slideredit_rt.checkpoint import fingerprint_base
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Dataset
from slideredit_rt.evaluation.own_images import OwnImageOptions, open_own_images
from slideredit_rt.evaluation.report import write_report
from slideredit_rt.evaluation.run import Benchmark, BenchmarkConfig
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.systems import SYSTEMS, System
from slideredit_rt.evaluation.worlds import EVALUATION, EvaluationWorld
from slideredit_rt.files import folder_fingerprint, sha256


def run_evaluation(
    setup: Setup,
    config: BenchmarkConfig,
    *,
    systems: Sequence[str] = (),
    own_images: OwnImageOptions | None = None,
    instructions: Sequence[str] | None = None,
    world: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Build an ONNX Runtime engine per adapter, run the benchmark and write the report.

    Args:
        setup: Base, adapters and engines, and the folder of the run. A killed run continues in that folder.
        config: Settings of the benchmark.
        systems: Names from `SYSTEMS`; empty for all that the setup allows.
        own_images: Images and scorers; None uses held-out scenes of `world`, for a base such as `portraits-kontext`.
        instructions: Instructions of the scenes; None uses all of the world's.
        world: Name of an embedded world from `EVALUATION`; None takes that of the base or an adapter, else the default one.
        progress: Show a progress bar on standard error.

    Returns:
        The contents of `report.json`.

    Raises:
        SliderEditError: A system or scorer is unknown, a system lacks its adapter, or the images are not valid.
    """
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise SliderEditError(f"{unknown[0]!r} is not a system of this benchmark; choose from {', '.join(SYSTEMS)}")
    scenes = EVALUATION[choose_world(world, [setup.base, *setup.adapters, setup.concepts, setup.offsets])]
    if own_images is None and setup.folder == resolve_base(scenes.base):
        setup = replace(setup, concepts=setup.concepts or scenes.concepts, offsets=setup.offsets or scenes.offsets)
    allowed = _allowed(setup)
    chosen = {name: system for name, system in allowed.items() if not systems or system.name in systems}
    compared = {system.name: system for system in chosen.values()}
    if missing := [name for name in systems if name not in compared]:
        needs = SYSTEMS[missing[0]].needs
        raise SliderEditError(f"system {missing[0]!r} needs {needs}; the given options allow {', '.join(allowed)}")
    trained = {name: found for name, system in allowed.items() if (found := system.trained(setup)) and name in chosen}
    dataset, data = _open_dataset(setup, own_images, scenes, instructions)
    fingerprints = {f"base {name}": digest for name, digest in fingerprint_base(setup.folder).items()}
    fingerprints |= {e.stem: e.fingerprint for e in setup.slider_engines} | data
    fingerprints |= {name: fingerprint for name, (_, fingerprint) in trained.items()}
    # The plain edit is needed even if the reference system is not compared.
    reference, system = next((name, system) for name, system in allowed.items() if system.reference)
    benchmark = Benchmark(setup, chosen, partial(system.make, setup, reference), dataset, config, fingerprints)
    rows = benchmark.run(progress=progress)
    about = {
        "base": setup.base,
        "sources": {e.stem: e.origin for e in setup.slider_engines} | {name: origin for name, (origin, _) in trained.items()},
        "fingerprints": fingerprints,
        "settings": benchmark.settings["config"],
        "instructions": "all" if instructions is None else list(instructions),
        "how": {name: f"{system.how}; the knob is {system.knob}" for name, system in compared.items()},
        "searched_ranges": {name: [list(ends) for ends in system.ranges] for name, system in compared.items()},
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "diffusers", "peft", "scipy")},
    }
    return write_report(rows, setup.out, about)


def _allowed(setup: Setup) -> dict[str, type[System]]:
    """Return every system that the setup allows, by the name of its variant, in the order of the registry."""
    allowed: dict[str, type[System]] = {}
    for system in SYSTEMS.values():
        for variant in system.variants(setup):
            if variant in allowed:
                raise SliderEditError(f"two systems would be named {variant!r}; rename the adapter or engine of that name")
            allowed[variant] = system
    return allowed


def _open_dataset(
    setup: Setup, own_images: OwnImageOptions | None, world: EvaluationWorld, instructions: Sequence[str] | None
) -> tuple[Dataset, dict[str, str]]:
    """Open the dataset and return it with the fingerprints of its parts."""
    if own_images is not None:
        dataset = open_own_images(own_images, setup.family, setup.folder)
        return dataset, {"images": folder_fingerprint(own_images.images), "prompts": sha256(own_images.prompts)}
    texts = world.instructions if instructions is None else instructions
    return world.dataset(instructions), {world.name: hashlib.sha256("\n".join(texts).encode()).hexdigest()}
