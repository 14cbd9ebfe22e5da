"""The TensorRT plugin: what it declares, what it launches, and that NVIDIA's own Python bindings accept it.

The bindings (fixture `nvidia_bindings`) run in a process of their own, where their Python half validates, tunes and compiles
the plugin as a builder would. Engines need real TensorRT.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from math import floor
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from slideredit_rt.errors import SliderEditError
from slideredit_rt.export import tensorrt_plugin
from slideredit_rt.kernels import aot, triton_linear
from slideredit_rt.kernels.configurations import configurations

TARGET = "sm90"
# FLUX's feed-forward, and a projection whose K only the smallest tile divides: dtype, K, N, rank.
PROJECTIONS: dict[str, tuple[str, int, int, int]] = {"wide": ("bfloat16", 3072, 12288, 16), "odd": ("float16", 96, 48, 48)}
# B, S.
SHAPES = [(1, 1), (1, 77), (2, 77), (3, 127), (1, 128), (1, 129), (2, 512), (1, 8832)]


# --- In the process with NVIDIA's bindings -----------------------------------------------------------------------------


def drive() -> dict[str, Any]:
    """What a builder asks the plugin, and its answers; B and S stay symbols throughout."""
    import sympy
    import tensorrt as trt
    import tensorrt.plugin as trtp
    from tensorrt.plugin._lib import QDP_REGISTRY

    class Size(trt.IDimensionExpr):
        """The library makes these; its class has no constructor in Python."""

        @classmethod
        def of(cls, value: Any) -> Size:
            size = cls.__new__(cls)
            size.value = sympy.sympify(value)
            return size

    class Algebra(trt.IExprBuilder):
        """Arithmetic on sizes, as sympy does it."""

        def constant(self, value: int) -> Size:
            return Size.of(value)

        def operation(self, op: Any, first: Size, second: Size) -> Size:
            operations = {"SUM": "__add__", "SUB": "__sub__", "PROD": "__mul__", "FLOOR_DIV": "__floordiv__"}
            return Size.of(getattr(first.value, operations[op.name])(second.value))

    def described(dims: tuple[int, ...], dtype: Any) -> Any:
        static, dynamic = trt.PluginTensorDesc(), trt.DynamicPluginTensorDesc()
        static.dims, static.type, static.format = dims, dtype, trt.TensorFormat.LINEAR
        dynamic.desc = static
        return dynamic

    definition = tensorrt_plugin.register(trt, TARGET)
    report: dict[str, Any] = {"id": definition.plugin_id, "inputs": definition.input_tensor_names, "projections": {}}
    report["registered_again"] = tensorrt_plugin.register(target=TARGET) is definition
    report["only_ahead_of_time"] = definition.impl_func is None and definition.aot_impl_func is not None
    try:
        tensorrt_plugin.register(trt, "sm80")
    except SliderEditError as error:
        report["another_target"] = str(error)

    creator = trt.get_plugin_registry().get_creator(tensorrt_plugin.NAME, "1", tensorrt_plugin.NAMESPACE)
    for name, (dtype, k, n, rank) in PROJECTIONS.items():
        strict, fields = trt.QuickPluginCreationRequest.STRICT_AOT, trt.PluginFieldCollection([])
        plugin = creator.create_plugin(tensorrt_plugin.NAME, tensorrt_plugin.NAMESPACE, fields, trt.TensorRTPhase.BUILD, strict)
        half = {"bfloat16": trt.DataType.BF16, "float16": trt.DataType.HALF}[dtype]
        types = [half, half, half, half, half, trt.DataType.FLOAT, half]
        dims = [(-1, -1, k), (n, k), (n,), (rank, k), (n, rank), (-1, -1), (-1, -1, n)]
        batch, rows = sympy.symbols("B S", integer=True)
        sizes = [[Size.of({0: batch, 1: rows}[i] if d == -1 else d) for i, d in enumerate(shape)] for shape in dims[:6]]
        answer: dict[str, Any] = {"kind": type(plugin).__name__}
        answer["output_types"] = [t.name for t in plugin.get_output_data_types(types[:6], [len(d) for d in dims[:6]])]
        plugin.get_output_shapes(sizes, [], Algebra())
        answer["output_shape"] = [str(size._expr.value) for size in plugin.output_descs[0].shape_expr]

        tensors = [described(*pair) for pair in zip(dims, types, strict=True)]
        combinations = plugin.get_supported_format_combinations(tensors, 6)
        answer["combinations"] = [[c.type.name for c in combinations[i : i + 7]] for i in range(0, len(combinations), 7)]
        answer["formats"] = sorted({c.format.name for c in combinations})
        plugin.configure_plugin(tensors[:6], tensors[6:])

        # The library's side of a launch takes values that Python cannot read back, so listen to what the plugin returns.
        returned: list[Any] = []
        implement = plugin.aot_impl_function
        plugin.aot_impl_function = lambda *a, f=implement, r=returned: r.append(f(*a)) or r[-1]
        answer["tactics"] = {}
        for tactic in plugin.get_valid_tactics():
            plugin.set_tactic(tactic)
            plugin.get_launch_params(sizes, tensors, 6, Received(), Received(), Algebra())
            entry, ptx = plugin.get_kernel([t.desc for t in tensors[:6]], [t.desc for t in tensors[6:]])
            how, scalars = returned[-1][2:]
            job = tensorrt_plugin.job_of(tactic, k, n, rank, dtype, TARGET)
            compiled, description = aot.compile_job(job)
            answer["tactics"][tactic] = {
                **{axis: str(getattr(how, axis)._expr.value) for axis in LAUNCH},
                "scalars": [str(size._expr.value) for size in scalars],
                "entry": entry,
                "same_ptx": ptx == compiled.encode(),
                "parameters": aot.parameters(ptx.decode()),
                "description": description,
            }
        report["projections"][name] = answer
    assert trtp.op.slideredit.MaskedLoRALinear is definition
    assert list(QDP_REGISTRY) == [tensorrt_plugin.PLUGIN]
    return report


LAUNCH = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")


class Received(dict[int, Any]):
    """Stands for the two objects of the builder that take launch parameters and scalars."""


# --- In the process of the tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(nvidia_bindings: dict[str, str]) -> dict[str, Any]:
    """`drive()`, from a process in which `import tensorrt` finds NVIDIA's bindings."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=nvidia_bindings, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_compiler_that_leaves_out_a_fence_is_refused_before_the_plugin_is_defined(nvidia_bindings: dict[str, str]) -> None:
    """With every fence removed from what Triton compiles."""
    script = """
        import re
        import tensorrt as trt
        from tensorrt.plugin._lib import QDP_REGISTRY
        from slideredit_rt.errors import SliderEditError
        from slideredit_rt.export import tensorrt_plugin
        from slideredit_rt.kernels import aot

        compile_with_fences = aot._compile

        def compile_without_fences(job, arguments):
            compiled = compile_with_fences(job, arguments)
            compiled.asm["ptx"] = re.sub("fence[.]proxy[.]async[^;]*;", "", compiled.asm["ptx"])
            return compiled

        aot._compile = compile_without_fences
        try:
            tensorrt_plugin.register(trt, "sm90")
        except SliderEditError as error:
            print(len(QDP_REGISTRY), error)
    """
    line = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(line, capture_output=True, text=True, env=nvidia_bindings, check=True)
    assert re.search(r"^0 masked_lora_linear-bf16-r16-\S+ for sm90 may compute wrong results", done.stdout, re.MULTILINE)


def launches(report: dict[str, Any]) -> Iterator[tuple[tuple[str, int, int, int], dict[str, Any]]]:
    for name, projection in PROJECTIONS.items():
        for tactic in report["projections"][name]["tactics"].values():
            yield projection, tactic


def value(expression: str, **sizes: int) -> int:
    return int(eval(expression, {"floor": floor, **sizes}))


def test_nvidias_bindings_register_the_plugin_and_create_its_ahead_of_time_object(report: dict[str, Any]) -> None:
    assert report["id"] == tensorrt_plugin.PLUGIN == "slideredit::MaskedLoRALinear"
    assert report["inputs"] == ["x", "weight", "bias", "lora_a", "lora_b", "row_scale"]
    assert report["only_ahead_of_time"], "an engine must not need Python"
    assert {p["kind"] for p in report["projections"].values()} == {"_TemplateAOTPlugin"}


def test_registering_again_is_free_and_another_target_is_refused(report: dict[str, Any]) -> None:
    assert report["registered_again"]
    assert "is already registered for sm90 with PTX 8.7 in this process; build for sm80" in report["another_target"]


def test_output_has_the_rows_of_x_the_columns_of_the_weight_and_the_dtype_of_x(report: dict[str, Any]) -> None:
    wide, odd = report["projections"]["wide"], report["projections"]["odd"]
    assert (wide["output_shape"], wide["output_types"]) == (["B", "S", "12288"], ["BF16"])
    assert (odd["output_shape"], odd["output_types"]) == (["B", "S", "48"], ["HALF"])


def test_every_tensor_is_bfloat16_or_float16_but_strengths_stay_float32(report: dict[str, Any]) -> None:
    for answer in report["projections"].values():
        assert answer["combinations"] == [[half] * 5 + ["FLOAT", half] for half in ("BF16", "HALF")]
        assert answer["formats"] == ["LINEAR"]


def test_tactics_are_the_configurations_of_the_table(report: dict[str, Any]) -> None:
    found = [t["description"]["configuration"] for t in report["projections"]["wide"]["tactics"].values()]
    table = [c.name for c in configurations("masked_lora_linear", 16, torch.bfloat16, 90)]
    assert found == [*table, "64x64x32-w8-s2"]
    assert [t["description"]["configuration"] for t in report["projections"]["odd"]["tactics"].values()] == ["32x32x32-w4-s2"]


def test_one_tactic_stays_within_the_shared_memory_that_every_launcher_gives(report: dict[str, Any]) -> None:
    for answer in report["projections"].values():
        assert min(int(t["shared_mem"]) for t in answer["tactics"].values()) <= 48 * 1024


@pytest.mark.parametrize(("batch", "rows"), SHAPES)
def test_launch_parameters_are_those_of_the_kernels_description(report: dict[str, Any], batch: int, rows: int) -> None:
    for (_, _, n, _), launch in launches(report):
        d = launch["description"]
        asked = [value(launch[axis], B=batch, S=rows) for axis in LAUNCH]
        grid = [value(size, rows=batch * rows, N=n) for size in d["grid"]]
        assert asked == [*grid, 1, 32 * d["num_warps"], 1, 1, d["shared_bytes"]], d["configuration"]
        block_m, block_n, _ = map(int, d["configuration"].split("-")[0].split("x"))
        assert grid == [-(-batch * rows // block_m) * -(-n // block_n), 1], "the whole output is written"


@pytest.mark.parametrize(("batch", "rows"), SHAPES)
def test_scalars_stand_between_input_and_output_pointers_in_the_kernels_order(
    report: dict[str, Any], batch: int, rows: int
) -> None:
    for (_, k, n, rank), launch in launches(report):
        names = [a["name"] for a in launch["description"]["arguments"]]
        scalars = names[len(report["inputs"]) : -1]
        assert [names[: len(report["inputs"])], names[-1]] == [report["inputs"], "y"]
        sizes = {"rows": batch * rows, "K": k, "N": n, "rank": rank}
        assert [value(s, B=batch, S=rows) for s in launch["scalars"]] == [sizes[name] for name in scalars]
        assert scalars == ["rows", "K", "N", "rank"]
        assert launch["parameters"] == ["u64"] * 6 + ["u32"] * 4 + ["u64"]


def test_ptx_is_the_one_that_is_compiled_ahead_of_time_for_every_other_launcher(report: dict[str, Any]) -> None:
    shipped = [f"{job.name}.{job.target}" for job in aot.jobs([TARGET], ["bfloat16", "float16"], [16, 48])]
    for (dtype, _, _, rank), launch in launches(report):
        d = launch["description"]
        assert launch["same_ptx"], d["configuration"]
        assert (launch["entry"], d["target"], d["dtype"]) == ("masked_lora_linear_kernel", TARGET, dtype)
        assert (d["spill_bytes"], d["global_scratch_bytes"], d["profile_scratch_bytes"]) == (0, 0, 0)
        name = f"masked_lora_linear-{aot.DTYPES[dtype]}-r{d['rank']}-{d['configuration']}.{TARGET}"
        small = tensorrt_plugin.tactics(0, rank, dtype, TARGET)[-1].name
        assert name in shipped or d["configuration"] == small


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rank", [16, 48])
def test_every_tactic_computes_the_formula(dtype: str, rank: int) -> None:
    """Under the interpreter, or on the device where there is one; two tiles of rows, the second not full."""
    device, rows, k, n = "cuda" if torch.cuda.is_available() else "cpu", 150, 128, 48
    g = torch.Generator().manual_seed(0)
    scale = torch.randn(rows, generator=g) * (torch.rand(rows, generator=g) < 0.3)
    shapes = {"x": (rows, k), "weight": (n, k), "bias": (n,), "lora_a": (rank, k), "lora_b": (n, rank)}
    p = {name: (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(device) for name, shape in shapes.items()}
    p = {name: tensor.to(getattr(torch, dtype)) for name, tensor in p.items()}
    x, weight, bias, a, b, s = *(tensor.double() for tensor in p.values()), scale.double().to(device)[:, None]
    exact = x @ weight.T + bias + s * (x @ a.T @ b.T)
    plain = F.linear(p["x"], p["weight"], p["bias"]) + s.to(p["x"].dtype) * F.linear(F.linear(p["x"], p["lora_a"]), p["lora_b"])
    for tactic in tensorrt_plugin.tactics(k, rank, dtype, TARGET):
        y = torch.full_like(plain, float("nan"))
        triton_linear.launch(**p, row_scale=scale.to(device), configuration=tactic, y=y)
        assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max(), tactic.name


@pytest.mark.parametrize(
    ("k", "n", "rank", "dtype", "target", "reason"),
    [
        (3072, 12288, 16, "bfloat16", "sm90", None),
        (3072, 3072, 128, "float16", "sm120", None),
        (96, 48, 48, "bfloat16", "sm80", None),
        (3072, 12288, 16, "float32", "sm90", "the plugin computes in bfloat16 or float16, not in float32"),
        (3072, 12288, 16, "bfloat16", "sm75", "no kernel is compiled for sm75, only for sm80, "),
        (3072, 12288, 10, "bfloat16", "sm90", "rank 10 is not a multiple of 16; pad lora_a and lora_b with zeros to 16"),
        (3072, 12288, 144, "bfloat16", "sm90", "rank 144 is outside the kernels' range 1 to 128"),
        (3072, 12288, 0, "bfloat16", "sm90", "rank 0 is outside"),
        (3072, 100, 16, "bfloat16", "sm90", "N = 100 is not a multiple of 16"),
        (80, 128, 16, "bfloat16", "sm90", "K = 80 is not a multiple of 32 or 64, the block sizes of the kernels"),
    ],
)
def test_a_projection_that_does_not_fit_is_told_apart_with_the_reason(
    k: int, n: int, rank: int, dtype: str, target: str, reason: str | None
) -> None:
    found = tensorrt_plugin.why_not(k, n, rank, dtype, target)
    assert found == reason if reason is None else found is not None and found.startswith(reason)


def test_whatever_fits_meets_the_multiples_of_every_kernel_that_it_may_get(report: dict[str, Any]) -> None:
    for (_, k, n, rank), launch in launches(report):
        multiples = launch["description"]["multiples"]
        assert not any(size % multiples[name] for name, size in (("K", k), ("N", n), ("rank", rank)))


def test_ranks_are_filled_up_to_a_multiple_of_sixteen() -> None:
    assert [tensorrt_plugin.graph_rank(r) for r in (1, 10, 16, 17, 48, 128)] == [16, 16, 16, 32, 48, 128]


def test_a_tactic_that_does_not_exist_says_which_do() -> None:
    with pytest.raises(SliderEditError, match="has tactics 1 to 3 for this projection, got 4; delete the timing cache"):
        tensorrt_plugin.job_of(4, 3072, 3072, 16, "bfloat16", "sm90")
    with pytest.raises(SliderEditError, match="cannot compute a projection from 3072 to 100 columns: N = 100"):
        tensorrt_plugin.job_of(1, 3072, 100, 16, "bfloat16", "sm90")


def test_without_tensorrt_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.delitem(sys.modules, "tensorrt.plugin", raising=False)
    with pytest.raises(SliderEditError, match=r"needs TensorRT, .*; pip install 'slideredit-rt\[tensorrt\]'$"):
        tensorrt_plugin.register(target="sm90")


def test_tensorrt_rtx_has_no_plugins_and_the_sentence_says_so() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(SliderEditError, match=r"pip install 'slideredit-rt\[tensorrt\]'$"):
        tensorrt_plugin.register(rtx, "sm90")


def test_without_a_device_the_target_must_be_given() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(SliderEditError, match="no CUDA device is visible"):
        tensorrt_plugin.this_card()


if __name__ == "__main__":
    print(json.dumps(drive()))  # noqa: T201
