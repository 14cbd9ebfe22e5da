"""Products of a warp (ISA: Warp-level Matrix Instructions, mma; Matrix Fragments for mma.m16n8k16 and mma.m16n8k8)."""

from __future__ import annotations

import numpy as np

from ptx.binding import Binding, Step, opcode, put
from ptx.numbers import Array, Mask, operands_of_tensor_cores

FORMS = {
    "sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "bf16",
    "sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "f16",
    "sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "tf32",
}


@opcode("mma")
def mma(b: Binding) -> Step:
    """Bind D = A · B + C with A `[16, K]`, B `[K, 8]`, and float32 C and D `[16, 8]`; K is 16, or 8 for TF32.

    A register of A or B holds 32 bits of inner columns: lane `4·g + t` the t-th of a half of them. Registers of A hold rows g
    and g + 8 in the first half of the columns, then in the second; those of B column g in the first half, then in the second.
    C and D hold columns 2t and 2t + 1 of row g, then of row g + 8.
    """
    b.require(*FORMS)
    kind = FORMS[".".join(b.modifiers)]
    target = b.targets(0, np.float32, 4)
    left, right, addend = b.vector(1, np.uint32, 4), b.vector(2, np.uint32, 2), b.vector(3, np.float32, 4)

    def fragments(registers: list[Array]) -> Array:
        """`[registers, warps, 8, columns]`."""
        values = operands_of_tensor_cores(np.stack(registers), kind)
        return values.reshape(len(registers), b.warps, 8, -1)

    def step(mask: Mask) -> None:
        b.check_whole_warps(mask)
        a, w = fragments(left), fragments(right)
        rows = np.concatenate([np.concatenate([a[0], a[2]], -1), np.concatenate([a[1], a[3]], -1)], 1)
        columns = np.concatenate([w[0], w[1]], -1)
        product = np.matmul(rows, columns.transpose(0, 2, 1)).reshape(b.warps, 2, 8, 4, 2)
        results = [addend[r] + product[:, r // 2, :, :, r % 2].ravel() for r in range(4)]
        for row, value in zip(target, results, strict=True):
            put(row, value, mask)

    return step
