"""Adapters: the trained A/B pairs, read from the formats they come in and written in one."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slideredit_rt.assets import resolve_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind
from slideredit_rt.files import atomic_file

_PREFIX = re.compile(r"^(transformer\.|base_model\.model\.|diffusion_model\.)+")
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight$")
_FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Adapter:
    """A low-rank update per linear.

    Attributes:
        family: base-model family it was trained for.
        kind: `st` or `gst`.
        rank: the largest R.
        pairs: module name to (A `[R, K]`, B `[N, R]`), float32, `lora_alpha / r` folded into B.
        source: where it came from, for messages.
        training: how it was trained, as far as the file says.
    """

    family: str
    kind: Kind
    rank: int
    pairs: dict[str, tuple[Tensor, Tensor]]
    source: str
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over module names, shapes and values, independent of the file format."""
        digest = hashlib.sha256()
        for name in sorted(self.pairs):
            for tensor in self.pairs[name]:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SliderEditError(f"adapter {str(path)!r} is not a readable safetensors file ({error})") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise SliderEditError(
            f"adapter {str(path)!r} is not a file of plain tensors and was not unpickled; "
            "convert it to safetensors on a machine where you trust it"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SliderEditError(
            f"adapter {str(path)!r} holds no dictionary of tensors; give the dictionary that the trainer saved"
        )
    return state


def _stored_scale(module: str, rank: int, settings: Mapping[str, Any]) -> float:
    """`lora_alpha / r` from a PEFT configuration (its `alpha_pattern` and `use_rslora` included)."""
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def load_adapter(source: str | Path, family: Family) -> Adapter:
    """Read an adapter.

    Formats: safetensors as diffusers writes them (`transformer.` prefix or not, stored alphas or not), a PEFT folder, a
    `torch.save`d dictionary of tensors (read with `weights_only`), and the embedded names.

    Raises:
        SliderEditError: no such file, not an adapter, an A without its B, or values that are not finite.
    """
    path = resolve_adapter(source)
    settings: dict[str, Any] = {}
    if path.is_dir():
        config = path / "adapter_config.json"
        if config.exists():
            settings = json.loads(config.read_text())
        found = next((path / name for name in _FOLDER_FILES if (path / name).exists()), None)
        if found is None:
            raise SliderEditError(
                f"folder {str(path)!r} holds none of {', '.join(_FOLDER_FILES)}; give the adapter's file or folder"
            )
        path = found
    if not path.exists():
        raise SliderEditError(f"adapter {str(source)!r} does not exist; give a file, a PEFT folder, shapes-st or shapes-gst")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        state, metadata = _read_safetensors(path)
        if "lora_adapter_metadata" in metadata:
            stored = json.loads(metadata["lora_adapter_metadata"])
            settings = {key.removeprefix("transformer."): value for key, value in stored.items()}
    else:
        state = _read_torch(path)

    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in state.items():
        name = _PREFIX.sub("", key)
        if match := _KEY.match(name):
            halves.setdefault(match["module"], {})[match["part"]] = tensor.float()
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(tensor)
    if not halves:
        raise SliderEditError(f"adapter {str(source)!r} holds no lora_A/lora_B weights; give a LoRA file for {family.name}")
    pairs = {}
    for module, parts in halves.items():
        if set(parts) != {"A", "B"} or parts["A"].ndim != 2 or parts["B"].ndim != 2 or len(parts["A"]) != parts["B"].shape[1]:
            raise SliderEditError(f"adapter {str(source)!r} is incomplete at {module}: lora_A and lora_B do not form a pair")
        rank = len(parts["A"])
        scale = alphas[module] / rank if module in alphas else _stored_scale(module, rank, settings)
        pairs[module] = (parts["A"].contiguous(), (parts["B"] * scale).contiguous())
        if not all(torch.isfinite(t).all() for t in pairs[module]):
            raise SliderEditError(
                f"adapter {str(source)!r} has values at {module} that are not finite; train or download it again"
            )
    only_text = all(family.rows_of(module) == "text" for module in pairs)
    kind: Kind = "st" if metadata.get("kind", "st" if only_text else "gst") == "st" else "gst"
    if metadata.get("family", family.name) != family.name:
        raise SliderEditError(f"adapter {str(source)!r} was trained for {metadata['family']}, not for {family.name}")
    return Adapter(
        family=family.name,
        kind=kind,
        rank=max(len(a) for a, _ in pairs.values()),
        pairs=pairs,
        source=str(source),
        training=json.loads(metadata.get("training", "{}")),
    )


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Write the canonical file: safetensors under diffusers' key names, loadable by `load_lora_weights`, with metadata."""
    tensors = {}
    for module, (lora_a, lora_b) in adapter.pairs.items():
        tensors[f"transformer.{module}.lora_A.weight"] = lora_a.detach().contiguous()
        tensors[f"transformer.{module}.lora_B.weight"] = lora_b.detach().contiguous()
    metadata = {
        "format": "pt",
        "family": adapter.family,
        "kind": adapter.kind,
        "rank": str(adapter.rank),
        "training": json.dumps(adapter.training, sort_keys=True),
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)
