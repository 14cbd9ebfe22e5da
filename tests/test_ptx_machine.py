"""The interpreter of PTX: fragments and layouts as the ISA draws them, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from ptx import machine
from ptx.fault import Fault
from ptx.machine import Machine
from ptx.memory import Buffer
from ptx.numbers import Array

from slideredit_rt import SliderEditError
from slideredit_rt.kernels.ptx import parse, unfenced_product

HEAD = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 memory[];
.visible .entry tested(.param .u64 .ptr .global .align 1 origin, .param .u64 .ptr .global .align 1 result)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<9>, %d<128>;
    .reg .b64 %a<9>;
    mov.u32 %r0, %tid.x;
    ld.param.b64 %a0, [origin];
    ld.param.b64 %a1, [result];
    mad.wide.u32 %a2, %r0, 4, %a0;
    mad.wide.u32 %a3, %r0, 4, %a1;
    mad.wide.u32 %a4, %r0, 16, %a0;
    shl.b32 %r1, %r0, 2;
    shl.b32 %r2, %r0, 4;
"""
"""%r0 is the lane, %r1 and %r2 are 4 and 16 times it, %a2, %a3 and %a4 its own 4, 4 and 16 bytes of the two buffers."""


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MOST_INSTRUCTIONS", 2000)


def run(body: str, origin: Array, result: int, threads: int = 32, schedule: str = "together") -> Array:
    """Run one block and return `result` 32-bit words. Shared memory has 64 KiB."""
    block = Machine(parse(HEAD.format(threads=threads) + body + "\n    ret;\n}\n"), 1 << 16)
    out = Buffer(1, np.full(result, 0xFFFFFFFF, np.uint32), "result")
    block.launch((1, 1), [Buffer(0, origin, "origin"), out], schedule)
    return out.array(np.uint32, (result,)).copy()


def refused(body: str, threads: int = 64, words: int = 256) -> str:
    """Run a body that is refused and return the message."""
    with pytest.raises(Fault) as caught:
        run(body, np.zeros(words, np.uint32), words, threads)
    return str(caught.value)


def numbers(*shape: int) -> Array:
    """Small whole numbers, which every type holds and every sum of which is exact."""
    return np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32)


def bits(values: Array, kind: str) -> Array:
    """Bits of whole numbers: 32 of TF32, 16 of the others."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if kind == "tf32":
        return wide
    return wide.view(np.float32).astype(np.float16).view(np.uint16) if kind == "f16" else (wide >> 16).astype(np.uint16)


# ISA, Matrix Fragments for mma.m16n8k16 with floating point type, and for mma.m16n8k8: the element (row, column) of each
# register's elements in a lane.


def places_of_a(lane: int, kind: str) -> list[list[tuple[int, int]]]:
    group, thread = lane // 4, lane % 4
    if kind == "tf32":
        return [[(group, thread)], [(group + 8, thread)], [(group, thread + 4)], [(group + 8, thread + 4)]]
    pair = [2 * thread, 2 * thread + 1]
    return [[(row, column + right) for column in pair] for right in (0, 8) for row in (group, group + 8)]


def places_of_b(lane: int, kind: str) -> list[list[tuple[int, int]]]:
    group, thread = lane // 4, lane % 4
    if kind == "tf32":
        return [[(thread, group)], [(thread + 4, group)]]
    return [[(2 * thread + low, group), (2 * thread + 1 + low, group)] for low in (0, 8)]


def places_of_c(lane: int) -> list[tuple[int, int]]:
    group, thread = lane // 4, lane % 4
    return [(group, 2 * thread), (group, 2 * thread + 1), (group + 8, 2 * thread), (group + 8, 2 * thread + 1)]


def test_the_places_of_one_lane_are_those_that_the_isa_draws() -> None:
    """Lane 13 is in group 3, and is thread 1 of it."""
    pairs = [[(3, 2), (3, 3)], [(11, 2), (11, 3)], [(3, 10), (3, 11)], [(11, 10), (11, 11)]]
    assert places_of_a(13, "bf16") == places_of_a(13, "f16") == pairs
    assert places_of_a(13, "tf32") == [[(3, 1)], [(11, 1)], [(3, 5)], [(11, 5)]]
    assert places_of_b(13, "bf16") == [[(2, 3), (3, 3)], [(10, 3), (11, 3)]]
    assert places_of_b(13, "tf32") == [[(1, 3)], [(5, 3)]]
    assert places_of_c(13) == [(3, 2), (3, 3), (11, 2), (11, 3)]


def register(values: list[int]) -> int:
    """Return a register of two 16-bit elements, the first in its low half, or of one of 32 bits."""
    return values[0] | values[1] << 16 if len(values) == 2 else values[0]


def fragment(matrix: Array, kind: str, places: list[list[list[tuple[int, int]]]]) -> Array:
    """Return registers `[registers, lanes]` of a matrix, for the places of every lane."""
    raw = bits(matrix, kind)
    lanes = [[register([int(raw[place]) for place in held]) for held in lane] for lane in places]
    return np.ascontiguousarray(np.array(lanes, np.uint32).T)


@pytest.mark.parametrize(("kind", "inner"), [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_mma_multiplies_the_fragments_of_the_isa(kind: str, inner: int) -> None:
    a, b, c = numbers(16, inner), numbers(inner, 8), numbers(16, 8)
    given = [
        fragment(a, kind, [places_of_a(lane, kind) for lane in range(32)]),
        fragment(b, kind, [places_of_b(lane, kind) for lane in range(32)]),
        fragment(c, "tf32", [[[place] for place in places_of_c(lane)] for lane in range(32)]),
    ]
    loads = "".join(f"ld.global.b32 %d{number}, [%a2+{128 * number}];" for number in range(10))
    product = f"mma.sync.aligned.m16n8k{inner}.row.col.f32.{kind}.{kind}.f32"
    operands = "{%d10,%d11,%d12,%d13}, {%d0,%d1,%d2,%d3}, {%d4,%d5}, {%d6,%d7,%d8,%d9}"
    stores = "".join(f"st.global.b32 [%a3+{128 * number}], %d{number + 10};" for number in range(4))
    found = run(f"{loads} {product} {operands}; {stores}", np.concatenate(given), 128).view(np.float32).reshape(4, 32)
    expected = a @ b + c
    for lane in range(32):
        assert [expected[place] for place in places_of_c(lane)] == found[:, lane].tolist()


def test_tensor_cores_drop_the_bits_that_tf32_lacks() -> None:
    a = np.zeros((16, 8), np.float32)
    a[0, 0] = np.float32(1 + 2**-10 + 2**-11 + 2**-23)
    given = fragment(a, "tf32", [places_of_a(lane, "tf32") for lane in range(32)])
    loads = "".join(f"ld.global.b32 %d{number}, [%a2+{128 * number}];" for number in range(4))
    body = (
        "mov.b32 %r8, 0f3F800000; mov.b32 %r7, 0f00000000; {rounded}"
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{%d4,%d5,%d6,%d7}}, {{%d0,%d1,%d2,%d3}}, {{%r8,%r8}}, "
        "{{%r7,%r7,%r7,%r7}}; st.global.b32 [%a3], %d4;"
    )
    assert run(loads + body.format(rounded=""), given, 32).view(np.float32)[0] == 1 + 2**-10
    rounded = "cvt.rna.tf32.f32 %d0, %d0;"
    assert run(loads + body.format(rounded=rounded), given, 32).view(np.float32)[0] == 1 + 2**-9


# ISA, Shared Memory Matrix Layout of wgmma: the byte of each element of a K-major matrix, in rows of 16-byte chunks.

STRIDES = {"none": 256, "32": 256, "64": 512, "128": 1024}
MODES = {"none": 0, "128": 1, "64": 2, "32": 3}


def chunk_address(row: int, chunk: int, swizzle: str) -> int:
    """Return the address of 16 bytes of a row in a matrix of 32 bytes a row (128 of them where rows are as wide)."""
    start = row // 8 * STRIDES[swizzle]
    if swizzle == "none":
        return start + chunk * 128 + row % 8 * 16
    width = int(swizzle)
    turned = {"128": row % 8, "64": row // 2 % 4, "32": row // 4 % 2}[swizzle]
    return start + row % 8 * width + (chunk ^ turned) * 16


def in_shared(matrix: Array, kind: str, swizzle: str, first_chunk: int) -> Array:
    """Return 32 KiB of memory that hold a matrix, whose rows are 32 bytes, from a chunk of its rows on."""
    memory = np.zeros(1 << 15, np.uint8)
    raw = bits(matrix, kind).view(np.uint8).reshape(len(matrix), 2, 16)
    for row in range(len(matrix)):
        for chunk in range(2):
            at = chunk_address(row, first_chunk + chunk, swizzle)
            memory[at : at + 16] = raw[row, chunk]
    return memory


def descriptor(start: int, swizzle: str) -> int:
    return start >> 4 | 128 >> 4 << 16 | STRIDES[swizzle] >> 4 << 32 | MODES[swizzle] << 62


def places_of_d(lane: int, columns: int) -> Iterator[tuple[int, int]]:
    """ISA, Register Fragments, D: four registers for every eight columns; each warp has 16 rows."""
    row, column = lane // 32 * 16 + lane % 32 // 4, lane % 4 * 2
    for eight in range(0, columns, 8):
        yield from [(row, eight + column), (row, eight + column + 1), (row + 8, eight + column), (row + 8, eight + column + 1)]


def test_one_lane_of_a_warpgroup_holds_what_the_isa_draws() -> None:
    """Lane 77 is in warp 2, group 3, and is thread 1 of it."""
    assert list(places_of_d(77, 16)) == [(35, 2), (35, 3), (43, 2), (43, 3), (35, 10), (35, 11), (43, 10), (43, 11)]


WGMMA_FORMS = [*[(kind, n) for kind in ("bf16", "f16") for n in (16, 32, 64, 128, 256)], ("tf32", 128), ("tf32", 256)]
"""Types and output columns of the forms in the kernels."""


@pytest.mark.parametrize("held", ["registers", "shared memory"])
@pytest.mark.parametrize(("kind", "columns"), WGMMA_FORMS)
def test_wgmma_multiplies_the_layouts_of_the_isa(kind: str, columns: int, held: str) -> None:
    inner = 8 if kind == "tf32" else 16
    a, b, d = numbers(64, inner), numbers(columns, inner), numbers(64, columns)
    expected = a @ b.T + d
    places = [list(places_of_d(lane, columns)) for lane in range(128)]
    before = np.ascontiguousarray(np.array([[d[place] for place in lane] for lane in places], np.float32).T)
    upper = [
        [[(row + lane // 32 * 16, column) for row, column in two] for two in places_of_a(lane % 32, kind)]
        for lane in range(128)
    ]
    for swizzle in MODES:
        # Where rows are wide enough, the matrices start in the middle of them, as in a later step of a long product.
        first = 2 if swizzle in ("64", "128") else 0
        memory = [in_shared(a, kind, swizzle, first), in_shared(b, kind, swizzle, first), before, fragment(a, kind, upper)]
        body = wgmma_body(kind, columns, held, [descriptor(start + 16 * first, swizzle) for start in (0, 1 << 15)])
        found = run(body, np.concatenate([part.view(np.uint8).ravel() for part in memory]), 64 * columns, 128)
        for lane, values in enumerate(found.view(np.float32).reshape(-1, 128).T):
            assert [expected[place] for place in places[lane]] == values.tolist()


def wgmma_body(kind: str, columns: int, held: str, descriptors: list[int]) -> str:
    """Return a body that copies 64 KiB to shared memory, loads D and A into registers, multiplies, and stores D."""
    count, inner = columns // 2, 8 if kind == "tf32" else 16
    left, transposed = ("%a5", ", 0, 0") if held == "shared memory" else ("{%r4,%r5,%r6,%r7}", ", 0")
    registers, end = ",".join(f"%d{number}" for number in range(count)), (1 << 16) + 512 * count
    copies = [f"[%a4+{at}]; st.shared.v4.b32 [%r2+{at}], {{%r4,%r5,%r6,%r7}};" for at in range(0, 1 << 16, 2048)]
    return "".join(
        [
            *(f"ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, {copy}" for copy in copies),
            *(f"ld.global.b32 %d{number}, [%a2+{(1 << 16) + 512 * number}];" for number in range(count)),
            *(f"ld.global.b32 %r{4 + number}, [%a2+{end + 512 * number}];" for number in range(4)),
            "fence.proxy.async.shared::cta; bar.sync 0; setp.eq.b32 %p0, %r0, %r0; wgmma.fence.sync.aligned;",
            f"mov.b64 %a5, {descriptors[0]}; mov.b64 %a6, {descriptors[1]};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k{inner}.f32.{kind}.{kind} {{{registers}}}, {left}, %a6, %p0, 1, 1",
            f"{'' if kind == 'tf32' else transposed};",
            "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
            *(f"st.global.b32 [%a3+{512 * number}], %d{number};" for number in range(count)),
        ]
    )


@pytest.mark.parametrize(
    ("form", "elements"),
    [("x4", (3 * 8 + 2, 3 * 8 + 3)), ("x4.trans", (2 * 8 + 3, 3 * 8 + 3))],
)
def test_ldmatrix_gives_each_lane_two_elements(form: str, elements: tuple[int, int]) -> None:
    """ISA, ldmatrix: lane 13 receives elements 2 and 3 of row 3 of each matrix, or those of its column 3."""
    origin = np.arange(256, dtype=np.uint16).view(np.uint32)
    body = (
        "ld.global.v4.b32 {%r4,%r5,%r6,%r7}, [%a4]; st.shared.v4.b32 [%r2], {%r4,%r5,%r6,%r7};"
        f"ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {{%d0,%d1,%d2,%d3}}, [%r2];"
        + "".join(f"st.global.b32 [%a3+{128 * number}], %d{number};" for number in range(4))
    )
    found = run(body, origin, 128).view(np.uint16).reshape(4, 32, 2)
    assert found[:, 13].tolist() == [[64 * matrix + element for element in elements] for matrix in range(4)]


@pytest.mark.parametrize("form", ["x4", "x4.trans"])
def test_stmatrix_is_the_reverse_of_ldmatrix(form: str) -> None:
    origin = np.arange(256, dtype=np.uint16).view(np.uint32)
    body = (
        "ld.global.v4.b32 {%r4,%r5,%r6,%r7}, [%a4]; st.shared.v4.b32 [%r2], {%r4,%r5,%r6,%r7};"
        f"ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {{%d0,%d1,%d2,%d3}}, [%r2];"
        f"stmatrix.sync.aligned.m8n8.{form}.shared.b16 [%r2+1024], {{%d0,%d1,%d2,%d3}};"
        + "".join(f"ld.shared.b32 %d4, [%r1+{1024 + at}]; st.global.b32 [%a3+{at}], %d4;" for at in (0, 128, 256, 384))
    )
    assert run(body, origin, 128).tolist() == origin.tolist()


STORE = "st.shared.b32 [%r1], %r0;"
NEIGHBOUR = "xor.b32 %r4, %r1, 128; ld.shared.b32 %r5, [%r4];"
COPY = "cp.async.cg.shared.global [%r2], [%a4], 16;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.b32 %r4, %r0;", "line 20, frobnicate.b32: the interpreter does not know frobnicate.b32"),
        ("tcgen05.wait::ld.sync.aligned;", "line 20, tcgen05.wait::ld.sync.aligned: the interpreter does not know"),
        ("add.sat.s32 %r4, %r0, 1;", "line 20, add.sat.s32: the interpreter does not know"),
        ("ld.global.b32 %r4, [%a2+1020];", "63 lanes out of bounds: 4 bytes at origin + 1024 of 1024"),
        ("st.global.b32 [%a2+-4], %r0;", "1 lanes out of bounds: 4 bytes at origin + -4"),
        ("ld.global.b32 %r4, [%a2+2];", "4 bytes at origin + 2 are misaligned"),
        ("ld.global.v2.b32 {%r4, %r5}, [%a2];", "8 bytes at origin + 4 are misaligned"),
        ("st.global.b32 [%a1], %r0;", "lanes write different values to one place of result"),
        ("st.shared.b32 [%r1+65536], %r0;", "of 65536 bytes of shared memory"),
        (STORE + NEIGHBOUR, "race: read after another warp's write"),
        (STORE + "bar.sync 0;" + NEIGHBOUR + STORE, "race: write after another warp's read"),
        (COPY + "ld.shared.b32 %r4, [%r2];", "a cp.async without a wait is filling"),
        (COPY + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r4, [%r2];", "a cp.async without a wait"),
        ("setp.lt.s32 %p0, %r0, 40; @%p0 bar.sync 0;", "reached by a part of a warp's lanes"),
        ("setp.lt.s32 %p0, %r0, 32; @%p0 bar.sync 0;", "a barrier that a predicate keeps lanes from"),
        ("\non: bra.uni on;", "the block does not end"),
        ("setp.lt.s32 %p0, %r0, 9; @%p0 shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;", "reached by a part of a warp's lanes"),
        ("div.s32 %r4, %r0, 0;", "division by zero"),
        ("mov.b32 %r4, %a2;", "%a2 is uint64"),
    ],
)
def test_what_hardware_would_not_forgive_is_refused(body: str, message: str) -> None:
    assert message in refused(body)


WAIT, FENCE = "cp.async.commit_group; cp.async.wait_group 0;", "fence.proxy.async.shared::cta;"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0,%d1,%d2,%d3}, %a0, %a1, 1, 1, 1, 0, 0;"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (COPY + WAIT + PRODUCT, True),
        (COPY + WAIT + FENCE + "bar.sync 0;" + PRODUCT, False),
        (COPY + WAIT + PRODUCT.replace("wgmma.mma_async", "tcgen05.mma"), True),
        (COPY + FENCE + WAIT + PRODUCT, True),
        (COPY + WAIT + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%d0}, {%r0}, {%r1}, {%d0};", False),
        (COPY + WAIT + "@%p0 " + FENCE + PRODUCT, True),
        # The second turn of a loop reads what its first turn waited for.
        (f"{FENCE}\nturn: {PRODUCT}{COPY}{WAIT} @%p0 bra turn;", True),
        (f"{FENCE}\nturn: {PRODUCT}{COPY}{WAIT}{FENCE} @%p0 bra turn;", False),
        # The product stands after the fence in the text, and one path reaches it without the fence.
        (f"{COPY}{WAIT} @%p0 bra past; {FENCE}\npast: {PRODUCT}", True),
        (f"bra.uni last;\nfirst: {PRODUCT} ret;\nlast: {COPY}{WAIT} bra.uni first;", True),
    ],
)
def test_a_product_of_copies_without_a_fence_is_found_on_every_path(body: str, found: bool) -> None:
    product = unfenced_product(parse(HEAD.format(threads=128) + body + "\n    ret;\n}\n"))
    assert (product is not None) is found
    assert product is None or "mma" in product.name


def test_copies_arrive_at_their_wait_and_barriers_end_races() -> None:
    body = COPY + "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;" + NEIGHBOUR + "st.global.b32 [%a3], %r5;"
    found = run(body, np.arange(256, dtype=np.uint32), 64, 64)
    assert found.tolist() == [lane ^ 32 for lane in range(64)]


@pytest.mark.parametrize("schedule", ["together", "forwards", "backwards"])
def test_lanes_part_and_meet_again_in_every_order_of_warps(schedule: str) -> None:
    """Even lanes add 100 to their number and odd lanes 200; then all take what their neighbour has."""
    body = (
        "and.b32 %r4, %r0, 1; setp.eq.b32 %p0, %r4, 0; @%p0 bra even;"
        "add.s32 %r5, %r0, 200; bra.uni meet; even: add.s32 %r5, %r0, 100;"
        "meet: shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; st.global.b32 [%a3], %r6;"
    )
    body = body.replace("even:", "\neven:\n").replace("meet:", "\nmeet:\n")
    assert run(body, np.zeros(1, np.uint32), 64, 64, schedule).tolist() == [
        (n ^ 1) + (200 if n % 2 == 0 else 100) for n in range(64)
    ]


def test_registers_and_shared_memory_start_as_nan() -> None:
    found = run("ld.shared.b32 %r4, [%r1]; st.global.b32 [%a3], %r4; st.global.b32 [%a3+128], %d9;", np.zeros(1, np.uint32), 64)
    assert np.isnan(found.view(np.float32)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD.format(threads=32), "does not end"),
        (HEAD.format(threads=32) + "3add %r4;}", "cannot be read"),
        (HEAD.format(threads=32).replace(".reqntid 32", "") + "}", "not one kernel"),
        (HEAD.format(threads=32) + ".reg .b64 %r4; }", "declares %r4"),
    ],
)
def test_text_that_is_not_one_whole_kernel_is_refused(text: str, message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        parse(text)


def test_instructions_keep_their_words_operands_and_line() -> None:
    kernel = parse(HEAD.format(threads=96) + "$L1:\n@!%p0 ld.global.v2.b32 {%r4, %r5}, [%a2+8];\n@%p1 bra $L1;\nret;}")
    load, branch, _ = kernel.code[-3:]
    assert (load.name, load.operands, load.guard, load.negated) == ("ld.global.v2.b32", ("{%r4, %r5}", "[%a2+8]"), "%p0", True)
    assert kernel.code[kernel.labels[branch.operands[0]]] is load
    assert (load.line, kernel.threads, kernel.parameters) == (21, 96, {"origin": "u64", "result": "u64"})
