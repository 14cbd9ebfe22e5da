"""What only a GPU can show: the ahead-of-time PTX, replayed CUDA graphs, compiled graphs, and memory errors.

`make gpu-test` runs this beside `test_triton_kernels.py`; it needs torch, triton, numpy, pytest and hypothesis only.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slideredit_rt import kernels
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export import tensorrt_plugin
from slideredit_rt.kernels import aot, triton_linear, triton_ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]

# CUfunction_attribute in cuda.h.
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


def target() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def tensors(rows: int, k: int, n: int, rank: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Every pointer argument of every kernel, by name; outputs hold NaN."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(rows, generator=g) * (torch.rand(rows, generator=g) < 0.3)
    found = {
        "x": torch.randn(rows, k, generator=g).to(dtype),
        "row_scale": scale,
        "weight": (torch.randn(n, k, generator=g) / k**0.5).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
        "lora_a": (torch.randn(rank, k, generator=g) / k**0.5).to(dtype),
        "lora_b": (torch.randn(n, rank, generator=g) / rank**0.5).to(dtype),
        "y": torch.full((rows, n), float("nan"), dtype=dtype),
    }
    return {name: tensor.cuda() for name, tensor in found.items()}


def expected(t: dict[str, Tensor], *, low_rank_only: bool = False) -> Tensor:
    """The formula in float64."""
    x, scale = t["x"].double(), t["row_scale"].double()[:, None]
    low = scale * (x @ t["lora_a"].double().T)
    if low_rank_only:
        return low
    return x @ t["weight"].double().T + t["bias"].double() + low @ t["lora_b"].double().T


def check(code: int) -> None:
    assert code == 0, f"CUDA driver error {code}"


def launch(ptx: str, d: dict[str, Any], grid: tuple[int, int], values: list[Tensor | int]) -> None:
    """Launch PTX through the CUDA driver with exactly the declared arguments."""
    cuda = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(cuda.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(ptx.encode())))
    check(cuda.cuModuleGetFunction(ctypes.byref(function), module, ctypes.c_char_p(d["entry"].encode())))
    check(cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, d["shared_bytes"]))
    boxes = [ctypes.c_int32(v) if isinstance(v, int) else ctypes.c_uint64(v.data_ptr()) for v in values]
    arguments = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    threads = 32 * d["num_warps"]
    check(cuda.cuLaunchKernel(function, *grid, 1, threads, 1, 1, d["shared_bytes"], stream, arguments, None))
    torch.cuda.synchronize()
    check(cuda.cuModuleUnload(module))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("spec", aot.SPECS, ids=lambda spec: spec.name)
def test_ahead_of_time_ptx_computes_the_formula(spec: Any, dtype: str) -> None:
    rows, k, n, rank = 333, 768, 528, 16
    jobs = [j for j in aot.jobs([target()], [dtype], [rank]) if j.spec_name == spec.name]
    if spec.name == triton_linear.SPEC.name:
        # TensorRT gets these, one of them a tile that no other launcher does.
        tactics = range(1, len(tensorrt_plugin.tactics(k, rank, dtype, target())) + 1)
        jobs += [tensorrt_plugin.job_of(tactic, k, n, rank, dtype, target()) for tactic in tactics]
    assert jobs
    for job in dict.fromkeys(jobs):
        if spec.name == triton_linear.SPEC.name and triton_ops.leaves_out_fences(int(target()[2:])):
            with pytest.raises(SliderEditError, match=r"install Triton 3\.7\.1"):
                aot.compile_job(job)
            continue
        ptx, d = aot.compile_job(job)
        t = tensors(rows, k, n, rank, getattr(torch, dtype))
        low_rank_only = spec.name == "masked_low_rank"
        parts = job.configuration.block_k if spec.name == "masked_lora_update" else 1
        t["low"] = torch.full((parts, rows, rank), float("nan"), device="cuda")
        if spec.name == "masked_lora_update":
            t["low"][:] = expected(t, low_rank_only=True).float() / parts
            t["y"] = F.linear(t["x"], t["weight"], t["bias"])
        sizes = {"rows": rows, "K": k, "N": n, "rank": rank, "members": 1}
        values = [sizes[a["name"]] if a["type"] == "i32" else t[a["name"]] for a in d["arguments"]]
        grid = [eval(size, {"rows": rows, "N": n, "parts": 1}) for size in d["grid"]]
        launch(ptx, d, (grid[0], grid[1]), values)
        for name in spec.outputs:
            want = expected(t, low_rank_only=low_rank_only)
            got = t[name].double().sum(0) if name == "low" else t[name].double()
            error = (got - want).abs().max() / want.abs().max()
            assert error <= 2 * torch.finfo(t[name].dtype).eps + 2**-11, f"{job.name}: {name} is off by {error:.2e}"


def test_ahead_of_time_update_adds_up_what_the_low_rank_product_wrote() -> None:
    """Both launched by their descriptions alone."""
    rows, k, n, rank = 333, 2048, 528, 16
    jobs = [job for job in aot.jobs([target()], ["bfloat16"], [rank]) if job.spec_name == "masked_lora_update"]
    low_rank = next(job for job in aot.jobs([target()], ["bfloat16"], [rank]) if job.spec_name == "masked_low_rank")
    for update in jobs:
        t, parts = tensors(rows, k, n, rank, torch.bfloat16), aot.compile_job(update)[1]["parts"]
        t["low"] = torch.full((parts, rows, rank), float("nan"), device="cuda")
        t["y"] = F.linear(t["x"], t["weight"], t["bias"])
        sizes = {"rows": rows, "K": k, "N": n, "rank": rank, "members": 1}
        for job in (low_rank, update):
            ptx, d = aot.compile_job(job)
            grid = [eval(size, {"rows": rows, "N": n, "parts": parts}) for size in d["grid"]]
            values = [sizes[a["name"]] if a["type"] == "i32" else t[a["name"]] for a in d["arguments"]]
            launch(ptx, d, (grid[0], grid[1]), values)
        want = expected(t)
        assert (t["y"].double() - want).abs().max() <= 2**-7 * want.abs().max(), update.name


@pytest.mark.parametrize("rows", [512, 8704])
def test_captured_graph_replays_with_other_masks_and_alphas(rows: int) -> None:
    """One capture, twenty settings, each bit-equal to an eager call: strengths live in a buffer, not in the graph."""
    t = tensors(rows, 768, 512, 16, torch.bfloat16)
    scale = t["row_scale"][None]
    arguments = [t["x"][None], t["weight"], t["bias"], t["lora_a"], t["lora_b"], scale]
    kernels.masked_lora_linear(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.masked_lora_linear(*arguments)
    g = torch.Generator().manual_seed(1)
    for setting in range(20):
        share = 0.0 if setting == 0 else 1.0 if setting == 1 else float(torch.rand(1, generator=g))
        scale.copy_(2 * torch.randn(1, rows, generator=g) * (torch.rand(1, rows, generator=g) < share))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, kernels.masked_lora_linear(*arguments)), f"setting {setting}"


def test_updates_are_not_smaller_than_they_should_be_on_average() -> None:
    """Tensor cores drop the low bits of float32 operands: without rounding first, by 0.035%."""
    t = tensors(2048, 768, 528, 16, torch.float16)
    y = torch.zeros_like(t["y"])
    kernels.masked_lora_update_triton_(y, t["x"], t["lora_a"], t["lora_b"], t["row_scale"])
    want = expected(t, low_rank_only=True) @ t["lora_b"].double().T
    assert abs((y.double() * want).sum() / (want * want).sum() - 1) < 2e-5


def test_alpha_zero_on_every_row_is_the_frozen_projection_bit_for_bit() -> None:
    for rows in (512, 8704):
        t = tensors(rows, 768, 512, 16, torch.bfloat16)
        y = kernels.masked_lora_linear(
            t["x"], t["weight"], t["bias"], t["lora_a"], t["lora_b"], torch.zeros_like(t["row_scale"])
        )
        assert torch.equal(y, F.linear(t["x"], t["weight"], t["bias"]))


@pytest.mark.parametrize("name", ["linear", "update"])
def test_compiled_graph_gives_what_eager_gives(name: str) -> None:
    t = tensors(300, 768, 528, 16, torch.bfloat16)

    def block(x: Tensor, row_scale: Tensor) -> Tensor:
        if name == "update":
            y = F.linear(x, t["weight"], t["bias"])
            return F.gelu(kernels.masked_lora_update_triton_(y, x, t["lora_a"], t["lora_b"], row_scale))
        operator = getattr(kernels, f"masked_lora_{name}_triton")
        return F.gelu(operator(x, t["weight"], t["bias"], t["lora_a"], t["lora_b"], row_scale))

    compiled = torch.compile(block, fullgraph=True)(t["x"], t["row_scale"])
    torch.testing.assert_close(compiled, block(t["x"], t["row_scale"]), atol=2**-6, rtol=2**-6)


def test_kernels_touch_no_memory_that_is_not_theirs() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    script = """
        import torch
        from slideredit_rt import kernels
        x, s = torch.randn(129, 60, device="cuda").bfloat16(), torch.zeros(129, device="cuda")
        s[[0, 77, 128]] = 0.5
        w, b = torch.randn(100, 60, device="cuda").bfloat16(), torch.randn(100, device="cuda").bfloat16()
        a, lb = torch.randn(4, 60, device="cuda").bfloat16(), torch.randn(100, 4, device="cuda").bfloat16()
        kernels.masked_lora_linear_triton(x, w, b, a, lb, s)
        kernels.masked_lora_update_triton_(torch.zeros(129, 100, device="cuda").bfloat16(), x, a, lb, s)
        torch.cuda.synchronize()
    """
    line = [tool, "--error-exitcode", "9", sys.executable, "-c", textwrap.dedent(script)]
    # Without torch's caching every tensor is an allocation of its own, whose ends the tool knows.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-3000:]


def test_engine_calls_follow_each_other_across_streams_and_replay_a_capture() -> None:
    for package in ("diffusers", "onnxruntime"):
        pytest.importorskip(package)
    from slideredit_rt.engines.cuda import CudaDevice

    device, x = CudaDevice(), torch.zeros(2**24, device="cuda")
    with device.stream() as handle:
        assert handle == torch.cuda.current_stream().cuda_stream != torch.cuda.default_stream().cuda_stream
        replay = device.capture(lambda stream: x.mul_(2).add_(1))
    assert x.count_nonzero() == 0, "capturing runs nothing"
    for caller in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        with torch.cuda.stream(caller), device.stream() as handle:
            assert caller == torch.cuda.default_stream() or handle == caller.cuda_stream
            replay()
    assert (x == 15).all(), "the default stream waits for the last one"


def test_lanes_hand_tensors_over_while_the_host_goes_on() -> None:
    """In both directions, with slow work before each hand-over, and memory that is given back at once."""
    pytest.importorskip("diffusers", reason="the engines' package needs it")
    from slideredit_rt.engines.cuda import Lane

    device = torch.device("cuda", torch.cuda.current_device())
    codec, steps = Lane(device), Lane(device, urgent=True)
    # The host may wait for a kernel that is loaded at its first use, and for memory that the allocator does not have yet.
    for lane in (codec, steps):
        with lane.work():
            torch.cuda._sleep(1)
            warm = [2 * torch.full((1 << 20,), 7.0, device=device) for _ in range(5)]
    torch.cuda.synchronize()
    del warm
    for giver, taker in ((codec, steps), (steps, codec)):
        with giver.work():
            torch.cuda._sleep(1_000_000_000)
            x = torch.full((1 << 20,), 7.0, device=device)
            mark = giver.mark()
        with taker.work():
            taker.take(mark, [x])
            torch.cuda._sleep(1_000_000_000)
            y = 2 * x
        assert mark is not None
        assert not mark.query(), "the host did not wait"
        del x
        with giver.work():
            overwriting = [torch.full((1 << 20,), -1.0, device=device) for _ in range(4)]
        torch.cuda.synchronize()
        assert bool((y == 14).all())
        del overwriting
