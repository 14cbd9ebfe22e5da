"""Small mistakes in PTX, which the tests must find.

Places are those of Triton's current output. Most mistakes are found in any place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EVERYWHERE = None


@dataclass(frozen=True)
class Mutant:
    """A replacement of a part of the text.

    Attributes:
        name: What is wrong.
        pattern: Regular expression of what is replaced.
        replacement: What stands there instead, as for `re.sub`.
        place: Which match, from 0; negative numbers count from the end. `EVERYWHERE` is all of them.
    """

    name: str
    pattern: str
    replacement: str = ""
    place: int | None = 0

    def matches(self, text: str) -> list[re.Match[str]]:
        return list(re.finditer(self.pattern, text))

    def apply(self, text: str) -> str:
        """Return the text with the mistake."""
        if self.place is EVERYWHERE:
            changed, count = re.subn(self.pattern, self.replacement, text)
            assert count
            return changed
        match = self.matches(text)[self.place]
        return text[: match.start()] + match.expand(self.replacement) + text[match.end() :]


BARRIER = Mutant("a barrier is left out", r"bar\.sync\s+0;")
_FOUR = r"\{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}, \{ (%r\d+), (%r\d+) \}, \{"
_WHERE = r"selp\.[bf]32\s+(%r\d+), (%r\d+), (?:0|0f0+), %p[1-4];"
_FETCH = r"(cp\.async\.c.\.shared\.global \[ %r\d+) \+ 0 \]"

MUTANTS: dict[str, tuple[Mutant, ...]] = {
    "sm80-masked_lora_linear-fp16-r16-128x128x64-w8-s3": (
        Mutant("a wait leaves one group more in flight", r"wait_group\s+3;", "wait_group 4;"),
        Mutant("the main loop's barrier is left out", r"(wait_group\s+3;)\s*bar\.sync\s+0;", r"\1"),
        Mutant("a group of copies is not closed", r"cp\.async\.commit_group;", place=6),
        Mutant("a copy lands 16 bytes further", _FETCH, r"\1 + 16 ]"),
        Mutant("a copy does not stop at the last inner column", r"0x10, %r\d+;", "0x10;", place=11),
        Mutant("tiles without an active row are the others", r"@%(p\d+) bra", r"@!%\1 bra"),
        Mutant("the last row is one further", r"setp\.lt\.s64", "setp.le.s64"),
        Mutant("quarters of A are swapped", r"\}, " + _FOUR, r"}, { \1, \3, \2, \4 }, { \5, \6 }, {"),
        Mutant("halves of B are swapped", r"\}, " + _FOUR, r"}, { \1, \2, \3, \4 }, { \6, \5 }, {"),
        Mutant("matrices arrive in other registers", r"b16 \{(%r\d+), (%r\d+), ", r"b16 {\2, \1, "),
        Mutant("the second product is not rounded", r"cvt\.rna\.tf32\.f32", "mov.b32", EVERYWHERE),
        Mutant(
            "neighbours of the output are swapped",
            r"(cvt\.rn\.f16x2\.f32\s+%r\d+), (%r\d+), (%r\d+);",
            r"\1, \3, \2;",
            place=-1,
        ),
        Mutant("a store ignores its predicate", r"@%p\d+ st\.global", "st.global", place=-1),
        Mutant("a store follows the opposite predicate", r"@%(p\d+) st\.global", r"@!%\1 st.global"),
        Mutant("a store is left out", r"@%p\d+ st\.global[^;]*;", place=-1),
        Mutant("a store goes 16 bytes further", r"(st\.global\S* \[ %rd\d+) \+ 0 \]", r"\1 + 16 ]"),
    ),
    "sm80-masked_low_rank-fp16-r16-32x16x128-w4-s4": (
        BARRIER,
        Mutant("a part starts at another column", r"%ctaid\.y;", "%ctaid.x;"),
        Mutant("inactive members are not replaced by 0", _WHERE, r"mov.b32 \1, \2;", EVERYWHERE),
    ),
    "sm80-masked_lora_update-fp16-r16-16x128x8-w4-s3": (
        BARRIER,
        Mutant("a part is added twice", r"(add\.f32\s+%r\d+), (%r\d+), (%r\d+);", r"\1, \3, \3;", place=-1),
        Mutant("inactive rows are updated", r"@%p\d+ st\.global", "st.global"),
        Mutant("a reduction skips half a warp", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 16,", r"\1, 8,"),
    ),
    "sm90-masked_lora_linear-bf16-r16-128x256x64-w8-s3": (
        Mutant("the main loop's last barrier is left out", r"bar\.sync\s+0;", place=5),
        Mutant("the fence before the tensor cores is left out", r"fence\.proxy\.async\S*;"),
        Mutant(
            "a wait leaves one product more in flight",
            r"wgmma\.wait_group\.sync\.aligned\s+2;",
            "wgmma.wait_group.sync.aligned 3;",
        ),
        Mutant("the last products are not waited for", r"wgmma\.wait_group\.sync\.aligned\s+0;"),
        Mutant("a group of products is not closed", r"wgmma\.commit_group\S*;"),
        Mutant("a descriptor starts 32 bytes further", r"4611686293305294850;", "4611686293305294852;"),
        Mutant("a descriptor swizzles in another way", r"4611686293305294848", str(4611686293305294848 + (1 << 62))),
        Mutant("a wait for copies leaves one more in flight", r"cp\.async\.wait_group\s+3;", "cp.async.wait_group 4;"),
    ),
}
"""Mistakes by target and job."""
