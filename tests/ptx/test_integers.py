"""Integer instructions, by hand."""

import numpy as np
import pytest
from ptx.snippet import evaluate

LEAST, MOST = -(2**31), 2**31 - 1
ONES = 2**32 - 1

# instruction, type of the result, of the inputs, and rows: the inputs and what must come out.
CASES = [
    ("add.s32", "s32", "s32", [(2, 3, 5), (MOST, 1, LEAST), (-1, 1, 0)]),
    ("add.u64", "u64", "u64", [(2**64 - 1, 2, 1), (2**32, 2**32, 2**33)]),
    ("add.sat.s32", "s32", "s32", [(MOST, 1, MOST), (LEAST, -1, LEAST), (5, -7, -2)]),
    ("sub.s32", "s32", "s32", [(2, 3, -1), (LEAST, 1, MOST)]),
    ("sub.u16", "u16", "u16", [(0, 1, 65535), (7, 7, 0)]),
    ("mul.lo.s32", "s32", "s32", [(-3, 5, -15), (65536, 65536, 0), (MOST, 2, -2)]),
    ("mul.hi.s32", "s32", "s32", [(-1, 1, -1), (LEAST, 2, -1), (LEAST, LEAST, 2**30)]),
    ("mul.hi.u32", "u32", "u32", [(ONES, ONES, ONES - 1), (65536, 65536, 1)]),
    ("mul.wide.s32", "s64", "s32", [(-1, 5, -5), (LEAST, LEAST, 2**62)]),
    ("mul.wide.u32", "u64", "u32", [(ONES, 2, 2**33 - 2)]),
    ("mul.wide.u16", "u32", "u16", [(65535, 65535, 65535**2)]),
    ("mul.hi.u64", "u64", "u64", [(2**63, 4, 2), (2**64 - 1, 2**64 - 1, 2**64 - 2)]),
    ("mul.hi.s64", "s64", "s64", [(-1, 1, -1), (-(2**63), 2, -1)]),
    ("div.s32", "s32", "s32", [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (LEAST, -1, LEAST)]),
    ("div.u32", "u32", "u32", [(7, 2, 3), (ONES, 2, MOST), (5, 0, ONES)]),
    ("rem.s32", "s32", "s32", [(7, 2, 1), (-7, 2, -1), (7, -2, 1), (LEAST, -1, 0)]),
    ("rem.u64", "u64", "u64", [(2**40 + 5, 8, 5)]),
    ("min.s32", "s32", "s32", [(-1, 1, -1), (LEAST, MOST, LEAST)]),
    ("min.u32", "u32", "u32", [(ONES, 1, 1)]),
    ("max.s64", "s64", "s64", [(-(2**40), 1, 1)]),
    ("and.b32", "u32", "u32", [(0b1100, 0b1010, 0b1000)]),
    ("or.b16", "u16", "u16", [(0b1100, 0b1010, 0b1110)]),
    ("xor.b64", "u64", "u64", [(2**63 + 1, 1, 2**63)]),
]


@pytest.mark.parametrize(("name", "result", "kind", "rows"), CASES, ids=lambda x: str(x)[:12])
def test_of_two(name: str, result: str, kind: str, rows: list[tuple[int, int, int]]) -> None:
    a, b, expected = (list(column) for column in zip(*rows, strict=True))
    found = evaluate(f"{name} y, a, b;", {"y": result}, {"a": (kind, a), "b": (kind, b)})["y"]
    assert found[: len(rows)].tolist() == expected


# Shifts take their amount in 32 bits: all of the type's bits and more leave nothing, or the sign.
@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [
        ("shl.b32", "u32", [(1, 31, 2**31), (3, 31, 2**31), (1, 32, 0), (5, 0, 5)]),
        ("shl.b64", "u64", [(1, 63, 2**63), (1, 64, 0)]),
        ("shl.b16", "u16", [(1, 15, 2**15), (1, 16, 0), (3, 15, 2**15)]),
        ("shr.s32", "s32", [(-8, 1, -4), (-1, 40, -1), (8, 40, 0)]),
        ("shr.u32", "u32", [(2**31, 31, 1), (ONES, 32, 0)]),
        ("shr.s64", "s64", [(-(2**40), 38, -4), (-1, 64, -1)]),
    ],
)
def test_shifts(name: str, kind: str, rows: list[tuple[int, int, int]]) -> None:
    a, n, expected = (list(column) for column in zip(*rows, strict=True))
    found = evaluate(f"{name} y, a, n;", {"y": kind}, {"a": (kind, a), "n": ("u32", n)})["y"]
    assert found[: len(rows)].tolist() == expected


@pytest.mark.parametrize(
    ("code", "inputs", "expected"),
    [
        ("mad.lo.s32 y, a, b, c;", (3, -5, 7), -8),
        ("mad.hi.u32 y, a, b, c;", (2**31, 4, 7), 9),
        ("sad.u32 y, a, b, c;", (3, 5, 10), 12),
        ("lop3.b32 y, a, b, c, 0x96;", (0b1100, 0b1010, 0b0110), 0b0000),
        ("lop3.b32 y, a, b, c, 0xe8;", (0b1100, 0b1010, 0b0110), 0b1110),
        ("lop3.b32 y, a, b, c, 0x40;", (0b1111, 0b1100, 0b1010), 0b0100),  # a and b and not c
        ("shf.l.wrap.b32 y, a, b, c;", (0x80000001, 0x00000002, 1), 5),
        ("shf.r.wrap.b32 y, a, b, c;", (0x80000001, 0x00000003, 33), 0xC0000000),
        ("shf.r.clamp.b32 y, a, b, c;", (0x80000001, 0x00000003, 40), 3),
        ("prmt.b32 y, a, b, c;", (0x33221100, 0x77665544, 0x7531), 0x77553311),
        ("prmt.b32 y, a, b, c;", (0x332281F0, 0x77665544, 0x89A8), 0xFFFF00FF),
        ("prmt.b32.f4e y, a, b, c;", (0x33221100, 0x77665544, 1), 0x44332211),
        ("prmt.b32.b4e y, a, b, c;", (0x33221100, 0x77665544, 1), 0x66770011),
        ("prmt.b32.rc8 y, a, b, c;", (0x33221100, 0x77665544, 2), 0x22222222),
        ("prmt.b32.rc16 y, a, b, c;", (0x33221100, 0x77665544, 1), 0x33223322),
        ("bfe.u32 y, a, b, c;", (0xABCD1234, 8, 8), 0x12),
        ("bfe.s32 y, a, b, c;", (0x00000F80, 7, 5), ONES),
        ("bfe.s32 y, a, b, c;", (0x80000000, 28, 8), 0xFFFFFFF8),
        ("bfe.u32 y, a, b, c;", (0x80000000, 28, 8), 8),
        ("bfi.b32 y, a, b, 8, 4;", (0xF5, 0xFFFFFFFF, 0), 0xFFFFF5FF),
        ("popc.b32 y, a;", (0xF00F0001, 0, 0), 9),
        ("clz.b32 y, a;", (0x00010000, 0, 0), 15),
        ("clz.b32 y, a;", (0, 0, 0), 32),
        ("bfind.u32 y, a;", (0x00010000, 0, 0), 16),
        ("bfind.s32 y, a;", (0xFFFFFFFF, 0, 0), ONES),
        ("brev.b32 y, a;", (1, 0, 0), 2**31),
        ("not.b32 y, a;", (0, 0, 0), ONES),
        ("add.s16x2 y, a, b;", (0x0001FFFF, 0x7FFF0001, 0), 0x80000000),
        ("max.s16x2 y, a, b;", (0x0001FFFF, 0x80000001, 0), 0x00010001),
        ("min.u16x2 y, a, b;", (0x0001FFFF, 0x80000001, 0), 0x00010001),
        ("neg.s32 y, a;", (5, 0, 0), 2**32 - 5),
        ("abs.s32 y, a;", (2**32 - 5, 0, 0), 5),
        ("abs.s32 y, a;", (2**31, 0, 0), 2**31),
        ("slct.u32.s32 y, a, b, c;", (1, 2, 2**31), 2),
        ("slct.u32.s32 y, a, b, c;", (1, 2, 0), 1),
    ],
)
def test_of_one_and_three(code: str, inputs: tuple[int, int, int], expected: int) -> None:
    a, b, c = (x % 2**32 for x in inputs)
    found = evaluate(code, {"y": "u32"}, {"a": ("u32", [a]), "b": ("u32", [b]), "c": ("u32", [c])})
    assert found["y"][0] == expected % 2**32


def test_a_carry_goes_on_to_the_next_word() -> None:
    code = "add.cc.u32 low, a, b; addc.cc.u32 mid, a, a; addc.u32 top, 0, 0;"
    kinds = {"low": "u32", "mid": "u32", "top": "u32"}
    found = evaluate(code, kinds, {"a": ("u32", [ONES, 1]), "b": ("u32", [1, 1])})
    assert [x[:2].tolist() for x in found.values()] == [[0, 2], [ONES, 2], [1, 0]]
    code = "sub.cc.u32 low, a, b; subc.u32 top, 5, 0;"
    found = evaluate(code, {"low": "u32", "top": "u32"}, {"a": ("u32", [0]), "b": ("u32", [1])})
    assert [x[0] for x in found.values()] == [ONES, 4]


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        ("eq.s32", [0, 1, 0]),
        ("ne.s32", [1, 0, 1]),
        ("lt.s32", [1, 0, 0]),
        ("lt.u32", [0, 0, 1]),
        ("ge.s32", [0, 1, 1]),
        ("hi.u32", [1, 0, 0]),
    ],
)
def test_comparisons(comparison: str, expected: list[int]) -> None:
    code = f"setp.{comparison} %p0, a, b; selp.u32 y, 1, 0, %p0;"
    a, b = ("u32", [ONES, 3, 4]), ("u32", [1, 3, 2**31])
    assert evaluate(code, {"y": "u32"}, {"a": a, "b": b})["y"][:3].tolist() == (
        expected if comparison != "ge.s32" else [0, 1, 1]
    )


def test_a_comparison_joins_a_predicate_and_has_a_complement() -> None:
    code = """setp.gt.u32 %p0, %t, 3;
    setp.lt.and.u32 %p1|%p2, %t, 6, %p0;
    selp.u32 y, 1, 0, %p1; selp.u32 z, 1, 0, %p2;"""
    found = evaluate(code, {"y": "u32", "z": "u32"})
    assert np.flatnonzero(found["y"]).tolist() == [4, 5]
    assert np.flatnonzero(found["z"]).tolist() == list(range(6, 32))


def test_a_guard_leaves_other_lanes_alone() -> None:
    code = "mov.u32 y, 7; setp.lt.u32 %p0, %t, 2; @%p0 mov.u32 y, 1; @!%p0 add.u32 y, y, 1;"
    assert evaluate(code, {"y": "u32"})["y"].tolist() == [1, 1, *[8] * 30]


def test_moves_pack_and_unpack() -> None:
    code = """mov.b64 %w0, {a, b}; mov.b64 {%r0, %r1}, %w0; mov.b32 {x, _}, a;
    sub.u32 y, %r1, %r0; mov.b32 z, {x, x};"""
    kinds = {"x": "u16", "y": "u32", "z": "u32"}
    found = evaluate(code, kinds, {"a": ("u32", [0x50003]), "b": ("u32", [0x50007])})
    assert [int(v[0]) for v in found.values()] == [3, 4, 0x30003]


def test_numbers_are_extended_by_their_own_type() -> None:
    code = """cvt.s64.s8 %w1, a; cvt.s64.s32 %w1, %w1; cvt.s32.s8 y, a;
    cvt.u32.u8 z, a; cvt.s64.s32 v, y; cvt.u16.u32 x, z;
    cvt.sat.s8.s32 u, b;"""
    kinds = {"y": "s32", "z": "u32", "v": "s64", "x": "u16", "u": "s32"}
    found = evaluate(code, kinds, {"a": ("u32", [0x1F0]), "b": ("s32", [-1000])})
    assert [int(v[0]) for v in found.values()] == [-16, 240, -16, 240, -128]
