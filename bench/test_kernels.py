"""The operators on the CPU, compared with torch's own projection, at the size of a FLUX.1-Kontext text projection."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from slideredit_rt.bench.projection import problem
from slideredit_rt.kernels import masked_lora_linear, masked_lora_update_


@pytest.fixture(scope="module")
def arguments() -> dict[str, torch.Tensor]:
    scale = torch.zeros(1, 512)
    scale[0, 20:52] = 0.5
    return problem(1, 512, 3072, 3072, 16) | {"row_scale": scale}


@pytest.mark.parametrize("name", ["base", "masked_lora_linear", "masked_lora_update_"])
def test_projection(benchmark: Any, arguments: dict[str, torch.Tensor], name: str) -> None:
    p = arguments
    base = partial(F.linear, p["x"], p["weight"], p["bias"])
    y = base()
    calls = {
        "base": base,
        "masked_lora_linear": partial(masked_lora_linear, **p),
        "masked_lora_update_": partial(masked_lora_update_, y, p["x"], p["lora_a"], p["lora_b"], p["row_scale"]),
    }
    with torch.inference_mode():
        benchmark.pedantic(calls[name], warmup_rounds=3, rounds=15, iterations=1)
