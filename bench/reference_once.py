"""Compare a step of FLUX.2-klein with and without source images that are read once, on ONNX Runtime and one CPU thread.

`python -m slideredit_rt.bench.reference_once` builds both engines from the same random weights of full width, with one block of
each kind, and prints the median times of calls in turns. It takes minutes and 8 GB of memory.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel

from slideredit_rt.bench.columns import manifest_of
from slideredit_rt.engines import get_backend
from slideredit_rt.engines.onnxruntime import OnnxRuntimeEngine
from slideredit_rt.export.linked_weights import export_linked
from slideredit_rt.families import EncodedImages, get_family
from slideredit_rt.families.flux2 import number_ids
from slideredit_rt.modules import SliderBackbone

TEXT_ROWS, IMAGE_ROWS, ROUNDS = 64, 256, 5
STEPS = 4


def engine_of(name: str, checkpoint: Path, folder: Path) -> OnnxRuntimeEngine:
    """Build and open an engine of a family, without sliders."""
    family = get_family(name)
    folder.mkdir()
    export_linked(family, checkpoint, None, folder)
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(checkpoint / "transformer"))
    manifest = manifest_of(SliderBackbone(family, transformer, None), get_backend("onnxruntime"), max_batch=1)
    return OnnxRuntimeEngine(folder, manifest, threads=1)


def main() -> None:
    """Build, measure and print."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        Flux2Transformer2DModel(
            num_layers=1, num_single_layers=1, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ).save_pretrained(root / "transformer")
        config = Flux2Transformer2DModel.load_config(root / "transformer")
        engines = {family: engine_of(family, root, root / family) for family in ("flux2", "flux2_kv")}
        plain, once = engines["flux2"], get_family("flux2_kv")
        whole = get_family("flux2").random_inputs(config, 1, TEXT_ROWS, 2 * IMAGE_ROWS, torch.Generator().manual_seed(1))
        noise = whole["img_ids"][:IMAGE_ROWS]
        latents = whole["hidden_states"]
        ids = {"img_ids": noise, "reference_ids": number_ids(noise, 1)}
        sources = EncodedImages(latents[:, IMAGE_ROWS:], ids, ((32, 32),), 256, 256)
        reading = once.read_inputs(config, sources)
        stored = once.with_read(sources, engines["flux2_kv"].read(reading).clone())
        split = whole | stored.inputs | {"hidden_states": latents[:, :IMAGE_ROWS].contiguous()}
        calls: dict[str, Any] = {
            "step with the source image": lambda: plain(whole),
            "step after a reading": lambda: engines["flux2_kv"](split),
            "reading": lambda: engines["flux2_kv"].read(reading),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    step, after, read = medians.values()
    lines = [f"{name:28} {seconds:.2f} s" for name, seconds in medians.items()]
    lines.append(f"step {after / step:.2f}; {STEPS} steps with the reading {(STEPS * after + read) / (STEPS * step):.2f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
