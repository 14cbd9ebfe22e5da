"""Results of a GPU bench: marks with their verdicts, and the JSON and Markdown files under `bench/results/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from slideredit_rt.bench.gpu_kernels import commit
from slideredit_rt.files import atomic_file

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<=": lambda value, limit: value <= limit,
    "<": lambda value, limit: value < limit,
    ">=": lambda value, limit: value >= limit,
}
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Mark:
    """A figure and the limit that it is held against.

    Attributes:
        name: Description of the figure.
        value: Measured figure.
        sign: `<=`, `<` or `>=`.
        limit: Bound of the figure.
        counted: True for counts, which are valid in a rehearsal, too.
    """

    name: str
    value: float
    sign: str
    limit: float
    counted: bool = False


def verdicts(marks: Sequence[Mark], *, timed: bool) -> list[dict[str, Any]]:
    """Return each mark with `passed`, which is None for the times of a rehearsal."""
    return [
        {
            "mark": mark.name,
            "value": round(mark.value, 4),
            "limit": f"{mark.sign} {mark.limit:g}",
            "passed": _HOLDS[mark.sign](mark.value, mark.limit) if timed or mark.counted else None,
        }
        for mark in marks
    ]


def save_run(
    name: str,
    command: str,
    device: torch.device,
    about: Mapping[str, Any],
    content: Mapping[str, Any],
    table: str,
    found: Sequence[Mapping[str, Any]],
    out: Path | None,
) -> str:
    """Write a run as JSON and Markdown into the folder of its GPU, and return the Markdown.

    Args:
        name: Stem of the files.
        command: Command that reproduces the run.
        device: Device of the run.
        about: Sizes and settings.
        content: Figures, for the JSON file.
        table: Figures, for the Markdown file.
        found: Marks from `verdicts`.
        out: Results folder; None writes nothing.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    facts = {"gpu": gpu, **about, "date": datetime.now(UTC).date().isoformat(), "commit": commit(), **_versions()}
    words = {True: "pass", False: "FAIL", None: "–"}
    rows = [f"| {m['mark']} | {m['value']} | {m['limit']} | {words[m['passed']]} |" for m in found]
    text = "\n".join([table, "| mark | value | limit | |", "|---|---|---|---|", *rows, ""])
    if out is not None:
        folder = out / gpu.lower().replace(" ", "-")
        with atomic_file(folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps({**facts, "command": command, **content, "marks": list(found)}, indent=1) + "\n")
        heading = f"# {name} on {gpu}\n\n{', '.join(f'{key} {value}' for key, value in facts.items() if key != 'gpu')}."
        with atomic_file(folder / f"{name}.md") as temporary:
            temporary.write_text(f"{heading} Reproduce: `{command}`.\n\n{text}")
    return text


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
