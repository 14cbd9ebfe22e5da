"""Writers for all adapter formats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from slideredit_rt.adapters.adapter import Adapter
from slideredit_rt.adapters.scales import DIFFUSERS_METADATA
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import get_family
from slideredit_rt.files import atomic_file, atomic_folder

Format = Literal["canonical", "diffusers", "peft", "slideredit-st"]
"""`canonical`: one safetensors file with metadata, which diffusers can load as well. `diffusers`: a folder with that file under
the name that `load_lora_weights` expects. `peft`: a folder for `PeftModel.from_pretrained`. `slideredit-st`: the `torch.save`d
dictionary of the authors' ST trainer."""
FORMATS: tuple[Format, ...] = ("canonical", "diffusers", "peft", "slideredit-st")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(adapter: Adapter, path: Path, form: Format = "canonical", *, dtype: torch.dtype | None = None) -> None:
    """Write an adapter atomically.

    All formats store a scale of 1, because `lora_alpha / r` is already in B; reading the file returns the same float32 values.
    All formats except `slideredit-st` keep family, kind, training and strength curve.

    Args:
        adapter: Single adapter, or a bank for `canonical`.
        path: File to write; for `diffusers` and `peft` a folder, which must not exist.
        form: File format.
        dtype: Dtype of the stored tensors. None keeps their original dtype if that is exact, else float32.

    Raises:
        SliderEditError: `path` cannot be written, a value exceeds the dtype, or the format cannot hold the adapter.
    """
    if form == "slideredit-st" and (adapter.kind != "st" or len({len(a) for a, _ in adapter.pairs.values()}) > 1):
        raise SliderEditError(
            f"adapter {adapter.source!r} is not an ST adapter with the same rank everywhere, and slideredit-st holds only "
            "those; use canonical, diffusers or peft"
        )
    joint = [name for name in adapter.pairs if get_family(adapter.family).rows_of(name) == "joint"]
    if form == "slideredit-st" and joint:
        raise SliderEditError(
            f"adapter {adapter.source!r} also updates {joint[0]}, on joint rows; a slideredit-st file, which does not state "
            "its kind, would be read as GST; use canonical, diffusers or peft"
        )
    if form != "canonical" and adapter.members:
        raise SliderEditError(
            f"adapter {adapter.source!r} is a bank, which only the canonical format can hold; use --to canonical"
        )
    tensors, config = _stored_tensors(adapter, form, dtype), _lora_config(adapter)
    metadata = _metadata(adapter)
    if form in ("canonical", "diffusers"):
        metadata[DIFFUSERS_METADATA] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    if form in ("diffusers", "peft"):
        with atomic_folder(path) as folder:
            # Not save_file, which makes the file readable only by its owner.
            (folder / (PEFT_FILE if form == "peft" else DIFFUSERS_FILE)).write_bytes(save(tensors, metadata))
            if form == "peft":
                (folder / PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}, indent=2) + "\n")
    else:
        with atomic_file(path) as temporary:
            if form == "canonical":
                temporary.write_bytes(save(tensors, metadata))
            else:
                torch.save(tensors, temporary)


def _stored_tensors(adapter: Adapter, form: Format, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors as a format stores them, by their names in the file."""
    prefix = {"slideredit-st": "", "peft": "base_model.model."}.get(form, "transformer.")
    dtype = _exact_dtype(adapter) if dtype is None else dtype
    tensors = {}
    for module, pair in adapter.pairs.items():
        for part, tensor in zip("AB", pair, strict=True):
            # Copy, because safetensors refuses tensors that share memory.
            stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            if not torch.isfinite(stored).all():
                raise SliderEditError(
                    f"adapter {adapter.source!r} has values at {module} that overflow {str(dtype).removeprefix('torch.')}; "
                    "use bfloat16 or float32"
                )
            tensors[f"{prefix}{module}.lora_{part}.weight"] = stored
    return tensors


def _metadata(adapter: Adapter) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    metadata = {
        "format": "pt",
        "family": adapter.family,
        "kind": adapter.kind,
        "rank": str(adapter.rank),
        "targets": json.dumps(adapter.targets),
        "training": json.dumps(adapter.training, sort_keys=True),
        "strength_curve": json.dumps(adapter.curve.to_json()),
    }
    if adapter.members:
        metadata["members"] = json.dumps({name: member.curve.to_json() for name, member in adapter.members.items()})
        metadata["member_kinds"] = json.dumps({name: member.kind for name, member in adapter.members.items()})
    return metadata


def _exact_dtype(adapter: Adapter) -> torch.dtype:
    dtype = DTYPES.get(adapter.dtype, torch.float32)
    exact = all(torch.equal(t.to(dtype).float(), t.float()) for pair in adapter.pairs.values() for t in pair)
    return dtype if exact else torch.float32


def _lora_config(adapter: Adapter) -> dict[str, Any]:
    """Return the adapter's PEFT configuration, with alpha equal to the rank in every module."""
    ranks = {name: len(a) for name, (a, _) in adapter.pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: r for name, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }
