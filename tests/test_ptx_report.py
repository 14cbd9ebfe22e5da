"""The report on main loops: what is counted, on kernels small enough to count by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slideredit_rt.bench import ptx_report
from slideredit_rt.kernels.ptx import parse

HEAD = """
.version 8.7
.target sm_90a
.visible .entry tested(.param .u64 x)
.reqntid 128
{
    .reg .pred %p<4>;
    .reg .b32 %r<40>;
    .reg .b64 %a<4>;
"""
LOOPS = """
    ld.global.v4.b32 {%r0,%r1,%r2,%r3}, [%a0];
outer:
inner:
    cp.async.cg.shared.global [%r4], [%a0], 0x10, %r5;
    cp.async.ca.shared.global [%r4], [%a0], 0x8, %r5;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    ld.shared.v2.b32 {%r6,%r7}, [%r4];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r8,%r9,%r10,%r11}, {%r0,%r1,%r2,%r3}, {%r6,%r7}, {%r8,%r9,%r10,%r11};
    wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%r12,%r13,%r14,%r15}, %a1, %a2, %p0, 1, 1;
    @%p0 bra inner;
    @%p1 bra outer;
waiting:
    bar.sync 0;
    @%p2 bra waiting;
    ret;
}
"""


def test_the_innermost_loop_that_multiplies_is_the_main_loop() -> None:
    (section,) = ptx_report.sections(parse(HEAD + LOOPS))
    assert section.loop
    assert section.kinds == {
        "bar.sync": 1,
        "cp.async 16 B": 1,
        "cp.async 8 B": 1,
        "cp.async.commit_group": 1,
        "cp.async.wait_group": 1,
        "ld.shared 8 B": 1,
        "mma m16n8k16 bf16": 1,
        "other": 1,
        "wgmma m64n8k8 tf32": 1,
    }
    # Four warps, which are one warpgroup, and 24 bytes of 128 threads.
    assert section.macs == 4 * 16 * 8 * 16 + 64 * 8 * 8
    assert section.loaded_bytes == 128 * 24
    assert section.bytes_per_mac == round(3072 / 12288, 5)


def test_a_kernel_without_a_loop_is_counted_whole() -> None:
    body = "ld.global.v2.b32 {%r0,%r1}, [%a0]; fma.rn.f32 %r2, %r0, %r1, %r1; st.global.b32 [%a0], %r2; ret;\n}\n"
    (section,) = ptx_report.sections(parse(HEAD + body))
    assert not section.loop
    assert section.kinds == {"fma.rn.f32": 1, "ld.global 8 B": 1, "other": 1, "st.global 4 B": 1}
    assert (section.macs, section.loaded_bytes) == (128, 1024)


def test_products_whose_size_stands_in_a_register_have_no_number() -> None:
    body = "tcgen05.mma.cta_group::1.kind::f16 [%r0], %a0, %a1, %r1, %p0; ret;\n}\n"
    (section,) = ptx_report.sections(parse(HEAD + body))
    assert section.kinds["tcgen05.mma kind::f16"] == 1
    assert (section.macs, section.bytes_per_mac) == (None, None)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        # 64 registers of 32 lanes are 2,048; a partition of 16,384 holds 8 warps, so 32 in all.
        ({}, 8),
        # 65 are rounded up to 72: 7 warps each, 28 in all.
        ({"registers": 65}, 7),
        # Of 228 KiB, each block takes 50 and one for the system.
        ({"shared_bytes": 50 * 1024}, 4),
        ({"registers": 16, "shared_bytes": 0}, 16),
        ({"registers": 16, "shared_bytes": 0, "num_warps": 1}, 32),
        ({"target": "sm120", "registers": 16, "shared_bytes": 0, "num_warps": 1}, 24),
    ],
)
def test_blocks_on_a_multiprocessor(changes: dict[str, Any], blocks: int) -> None:
    description = {"target": "sm90", "registers": 64, "shared_bytes": 1024, "num_warps": 4}
    assert ptx_report.blocks_per_multiprocessor(description | changes) == blocks


def test_the_report_is_a_table_and_a_json_file(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "slideredit_rt.bench.ptx_report", "--out", str(tmp_path)]
    line += ["--targets", "sm90", "--dtypes", "bfloat16", "--ranks", "16"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    kernels = json.loads((tmp_path / "ptx.json").read_text())["kernels"]
    assert {kernel["kernel"] for kernel in kernels} == {"masked_lora_linear", "masked_low_rank", "masked_lora_update"}
    assert done.stdout in (tmp_path / "ptx.md").read_text()
    assert "4 wgmma m64n256k16 bf16" in done.stdout


def test_an_unknown_target_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ptx_report", "--targets", "sm75"])
    with pytest.raises(SystemExit) as left:
        ptx_report.main()
    assert left.value.code == 2
    assert "unknown target 'sm75'; choose from sm80" in capsys.readouterr().err
