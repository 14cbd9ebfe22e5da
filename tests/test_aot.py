"""Kernels compiled ahead of time: the PTX, its description, and the command that writes both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slideredit_rt import cli
from slideredit_rt.bench import ptx_report
from slideredit_rt.kernels import aot
from slideredit_rt.kernels.configurations import SHARED_KIB

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process that compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "slideredit_rt.cli", "kernels", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is shipped in bfloat16 at rank 16, for every capability."""
    out = tmp_path_factory.mktemp("kernels")
    done = command("build", "--targets", ",".join(TARGETS), "--dtypes", "bfloat16", "--out", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def descriptions(folder: Path) -> list[dict[str, Any]]:
    return aot.built(folder)


def test_every_shipped_configuration_is_built_for_every_target(folder: Path, descriptions: list[dict[str, Any]]) -> None:
    expected = {f"{job.name}.{job.target}.ptx" for job in aot.jobs(TARGETS, ["bfloat16"], [16])}
    assert {d["file"] for d in descriptions} == expected
    assert {d["kernel"] for d in descriptions} == {spec.name for spec in aot.SPECS}
    assert {d["target"] for d in descriptions} == set(TARGETS)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_nothing_shipped_spills_or_needs_scratch_memory(descriptions: list[dict[str, Any]]) -> None:
    for d in descriptions:
        assert (d["spill_bytes"], d["global_scratch_bytes"], d["profile_scratch_bytes"]) == (0, 0, 0), d["file"]
        assert 0 < d["registers"] <= 255


def test_shared_memory_fits_the_card(descriptions: list[dict[str, Any]]) -> None:
    for d in descriptions:
        assert 0 < d["shared_bytes"] <= SHARED_KIB[int(d["target"][2:])] * 1024, d["file"]


def test_ptx_takes_exactly_the_declared_arguments(folder: Path, descriptions: list[dict[str, Any]]) -> None:
    for d in descriptions:
        ptx = (folder / d["file"]).read_text()
        declared = ["u32" if a["type"] == "i32" else "u64" for a in d["arguments"]]
        assert aot.parameters(ptx) == declared, d["file"]
        assert re.search(r"\.visible \.entry (\w+)", ptx)[1] == d["entry"]  # type: ignore[index]
        assert f".version {d['ptx_isa']}\n" in ptx
        assert re.search(rf"\.target sm_{d['target'][2:]}a?\b", ptx)
        assert f".reqntid {32 * d['num_warps']}" in ptx


def test_arguments_are_inputs_then_sizes_then_outputs(descriptions: list[dict[str, Any]]) -> None:
    """The order that TensorRT's ahead-of-time plugins pass them in."""
    d = next(d for d in descriptions if d["kernel"] == "masked_lora_linear")
    assert [a["name"] for a in d["arguments"]] == [
        *("x", "weight", "bias", "lora_a", "lora_b", "row_scale"),
        *("rows", "K", "N", "rank"),
        "y",
    ]
    assert {a["type"] for a in d["arguments"] if a["name"] not in ("row_scale", "rows", "K", "N", "rank")} == {"*bf16"}
    assert next(a["type"] for a in d["arguments"] if a["name"] == "row_scale") == "*fp32", "strengths are never rounded"


@pytest.mark.parametrize(("rows", "n"), [(1, 16), (33, 3072), (1000, 3088)])
def test_grid_covers_the_output(descriptions: list[dict[str, Any]], rows: int, n: int) -> None:
    """In whole numbers."""
    for d in descriptions:
        programs = [eval(size, {"rows": rows, "N": n, "parts": 8}) for size in d["grid"]]
        assert all(isinstance(count, int) for count in programs)
        block_m, block_n, _ = map(int, d["configuration"].split("-")[0].split("x"))
        if d["kernel"] == "masked_lora_linear":
            assert programs == [-(-rows // block_m) * -(-n // block_n), 1]
        if d["kernel"] == "masked_low_rank":
            assert programs == [-(-rows // block_m), 8]
        assert ("parts" in d) == (d["kernel"] == "masked_lora_update")
        if d["kernel"] == "masked_lora_update":
            assert d["parts"] == int(d["configuration"].split("-")[0].split("x")[2])
            assert programs == [-(-n // block_n), -(-rows // block_m)]


def test_operands_of_the_second_product_are_rounded(folder: Path, descriptions: list[dict[str, Any]]) -> None:
    """Tensor cores drop the low bits of TF32 operands."""
    for d in descriptions:
        ptx = (folder / d["file"]).read_text()
        multiplies = any("tf32" in line and "mma" in line for line in ptx.splitlines())
        assert multiplies == (d["kernel"] != "masked_low_rank"), d["file"]
        assert multiplies == ("cvt.rna.tf32.f32" in ptx), d["file"]


# Products of the main loops at rank 16, which the frozen projection and the low-rank product take turns in.
PRODUCTS = {
    ("sm80", "masked_lora_linear"): {"mma m16n8k16 bf16"},
    ("sm90", "masked_lora_linear"): {"wgmma m64n256k16 bf16", "wgmma m64n16k16 bf16"},
    ("sm100", "masked_lora_linear"): {"tcgen05.mma kind::f16"},
    ("sm80", "masked_low_rank"): {"mma m16n8k16 bf16"},
}


def pinned(target: str, kernel: str) -> set[str]:
    """sm86, sm89 and sm120 multiply as sm80 does; so does every target where rows are few."""
    return PRODUCTS.get((target, kernel), PRODUCTS["sm80", kernel])


def test_main_loops_multiply_on_tensor_cores_and_copy_without_registers(
    folder: Path, descriptions: list[dict[str, Any]]
) -> None:
    for d in descriptions:
        report = ptx_report.report((folder / d["file"]).read_text(), d)
        assert report["spill_bytes"] == 0
        if d["kernel"] == "masked_lora_update":
            # Its inner columns fit a tile, so it has no loop.
            assert not any(section["loop"] for section in report["sections"])
            continue
        assert len(report["sections"]) == (2 if d["kernel"] == "masked_lora_linear" else 1), "tiles without an active row"
        for section in report["sections"]:
            kinds, products = section["kinds"], pinned(d["target"], d["kernel"])
            assert section["loop"]
            found = {kind for kind in kinds if "fma" in kind or re.match(r"(wgmma|mma|tcgen05\.mma) ", kind)}
            assert found <= products, d["file"]
            assert max(products, key=len) in found, d["file"]
            assert not [kind for kind in kinds if kind.startswith(("ld.global", "st.global", "ld.local", "st.local"))], d[
                "file"
            ]
            copied = {int(kind.split()[1]): count for kind, count in kinds.items() if re.match(r"cp\.async \d", kind)}
            # 256 threads share 2 KiB of A.
            assert sum(count for size, count in copied.items() if size != 16) <= (8 in copied), d["file"]
            assert copied[16] >= 4, d["file"]


def test_ptx_names_no_path_of_the_machine(tmp_path: Path) -> None:
    """Compiled from two copies of the package: equal files, without source positions."""
    script = "from slideredit_rt.kernels import aot; print(aot.compile_job(aot.jobs(['sm90'], ['bfloat16'], [16])[-1])[0])"
    ptx = []
    for place in ("here", "elsewhere"):
        line = ["make", f"STAGE={tmp_path / place}", str(tmp_path / place)]
        subprocess.run(line, check=True, capture_output=True, cwd=Path(__file__).parents[1])
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": str(tmp_path / place), "TRITON_CACHE_DIR": str(tmp_path / f"cache of {place}")}
        done = subprocess.run([sys.executable, "-P", "-c", script], check=True, capture_output=True, text=True, env=environment)
        ptx.append(done.stdout)
    assert ptx[0] == ptx[1]
    assert not re.search(r"^\s*\.(file|loc|section)\b", ptx[0], re.MULTILINE)


def test_a_second_build_compiles_nothing_and_a_damaged_file_is_built_again(folder: Path) -> None:
    arguments = ("build", "--targets", "sm90", "--dtypes", "bfloat16", "--out", str(folder), "--quiet", "--json")
    assert json.loads(command(*arguments).stdout)["compiled"] == 0
    victim = next(folder.glob("masked_low_rank*.sm90.ptx"))
    victim.write_text(victim.read_text()[:100])
    assert json.loads(command(*arguments).stdout)["compiled"] == 1
    assert aot.parameters(victim.read_text())


def test_another_ptx_version_only_when_asked_for() -> None:
    job = next(j for j in aot.jobs(["sm90"], ["bfloat16"], [16], "8.6") if j.spec_name == "masked_low_rank")
    script = (
        "from slideredit_rt.kernels import aot;"
        "j = next(j for j in aot.jobs(['sm90'], ['bfloat16'], [16], '8.6') if j.spec_name == 'masked_low_rank');"
        "print(aot.compile_job(j)[0])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ptx = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True).stdout
    assert job.ptx_isa == "8.6"
    assert ".version 8.6\n" in ptx


# A Triton that leaves out every fence, as versions before 3.7.1 do between `cp.async` and the products of sm90.
WITHOUT_FENCES = """
import re, sys
from slideredit_rt import cli
from slideredit_rt.kernels import aot

compile_with_fences = aot._compile


def compile_without_fences(job, arguments):
    compiled = compile_with_fences(job, arguments)
    compiled.asm["ptx"] = re.sub(r"fence\\.proxy\\.async[^;]*;", "", compiled.asm["ptx"])
    return compiled


aot._compile = compile_without_fences
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("target", "product"), [("sm90", "wgmma.mma_async"), ("sm100", "tcgen05.mma")])
def test_a_compiler_that_leaves_out_a_fence_is_refused_and_nothing_is_written(
    target: str, product: str, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = ["kernels", "build", "--dtypes", "bfloat16", "--processes", "1", "--quiet", "--targets"]
    line = [sys.executable, "-c", WITHOUT_FENCES, *arguments]

    def build(targets: str, out: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*line, targets, "--out", str(out)], capture_output=True, text=True, env=environment, check=False)

    done = build(f"sm80,{target}", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert re.search(
        rf"masked_lora_linear-bf16-\S+ for {target} may compute wrong results: Triton \S+ puts no fence\.proxy\.async "
        rf"between cp\.async and {re.escape(product)}; install Triton 3\.7\.1 or newer$",
        done.stderr.strip(),
    )
    assert not (tmp_path / "out").exists(), "the kernels of sm80 compiled, but an incomplete folder looks complete"
    assert build("sm80", tmp_path / "sm80").returncode == 0, "these products need no fence"


def test_list_shows_what_each_kernel_uses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "target", "registers", "spill_bytes", "shared_bytes", "num_warps", "ptx_isa"]
    assert len(lines) == 1 + len(aot.built(folder))
    assert cli.main(["kernels", "list", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["kernels"]) == len(lines) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--targets", "sm75"], "unknown target 'sm75'; choose from sm80"),
        (["build", "--dtypes", "int8"], "unknown dtype 'int8'; choose from bfloat16"),
        (["build", "--ranks", "200"], "rank 200 is outside the kernels' range 1 to 128"),
        (["build", "--ptx-isa", "new"], "PTX ISA 'new' is not a version"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["kernels", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interpreting_process_refuses_to_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this process compiles")
    assert cli.main(["kernels", "build", "--targets", "sm90", "--out", str(tmp_path), "--processes", "1"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_folder_without_kernels_says_how_to_build_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "list", str(tmp_path)]) == 2
    assert "slideredit-rt kernels build --out" in capsys.readouterr().err
    (tmp_path / "broken.sm90.json").write_text("{")
    assert cli.main(["kernels", "list", str(tmp_path)]) == 2
    assert "is not a kernel description" in capsys.readouterr().err
