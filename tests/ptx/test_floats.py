"""Floating point: rounding, NaN, signs of zero, subnormals, and conversions."""

import math

import numpy as np
import pytest
import torch
from ptx.snippet import evaluate

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-149  # the least float32
ULP = 2.0**-23  # of float32 numbers in [1, 2)


def same(found: np.ndarray, expected: list[float]) -> bool:
    """Equal, zeros with their signs, NaN like NaN."""
    rows = zip(found.tolist(), expected, strict=False)
    return all(
        (math.isnan(x) and math.isnan(y)) or (x == y and math.copysign(1, x) == math.copysign(1, y))
        for x, y in rows
    )


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("add.f32", [(1, ULP / 2, 1), (1, 0.75 * ULP, 1 + ULP), (INF, -INF, NAN)]),
        ("add.f32", [(-0.0, -0.0, -0.0), (-1, 1, 0.0)]),
        ("add.rz.f32", [(1, 0.75 * ULP, 1), (-1, -0.75 * ULP, -1)]),
        ("add.rp.f32", [(1, TINY, 1 + ULP), (-1, -TINY, -1)]),
        ("add.rm.f32", [(1, TINY, 1), (-1, -TINY, -1 - ULP)]),
        ("add.ftz.f32", [(TINY, TINY, 0), (-TINY, -0.0, -0.0), (1, TINY, 1)]),
        ("add.sat.f32", [(3, 1, 1), (-3, 1, 0), (0.25, 0.25, 0.5), (NAN, 1, 0)]),
        ("sub.f32", [(1, 1, 0.0), (INF, INF, NAN)]),
        ("mul.f32", [(TINY, 0.5, 0), (TINY, -0.5, -0.0), (1e30, 1e30, INF), (0, INF, NAN)]),
        ("mul.rz.f32", [(3.4e38, 3.4e38, float(np.finfo(np.float32).max))]),
        ("min.f32", [(NAN, 1, 1), (2, NAN, 2), (NAN, NAN, NAN), (0.0, -0.0, -0.0), (-1, 1, -1)]),
        ("max.f32", [(NAN, 1, 1), (2, NAN, 2), (NAN, NAN, NAN), (-0.0, 0.0, 0.0), (-1, 1, 1)]),
        ("max.NaN.f32", [(NAN, 1, NAN), (1, NAN, NAN), (1, 2, 2)]),
        ("div.rn.f32", [(1, 3, float(np.float32(1 / 3))), (1, 0, INF), (-1, 0, -INF), (0, 0, NAN)]),
        ("div.full.f32", [(6, 3, 2)]),
        ("copysign.f32", [(-1, 5, -5), (0.0, -5, 5)]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_float32(name: str, rows: list[tuple[float, float, float]]) -> None:
    a, b, expected = (list(column) for column in zip(*rows, strict=True))
    found = evaluate(f"{name} y, a, b;", {"y": "f32"}, {"a": ("f32", a), "b": ("f32", b)})["y"]
    assert same(found, expected)


def test_fma_rounds_once() -> None:
    x = 1 + ULP
    inputs = {"a": ("f32", [x, 0]), "b": ("f32", [x, INF]), "c": ("f32", [-(1 + 2 * ULP), 1])}
    found = evaluate("fma.rn.f32 y, a, b, c;", {"y": "f32"}, inputs)["y"]
    assert same(found, [ULP**2, NAN])
    unfused = evaluate("mul.rn.f32 y, a, b; add.rn.f32 y, y, c;", {"y": "f32"}, inputs)["y"]
    assert same(unfused, [0.0, NAN])


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ex2.approx.f32", [(3, 8), (-INF, 0), (INF, INF), (-149, TINY), (NAN, NAN)]),
        ("ex2.approx.ftz.f32", [(-149, 0), (-TINY, 1)]),
        ("lg2.approx.f32", [(8, 3), (0, -INF), (-1, NAN)]),
        ("rsqrt.approx.f32", [(4, 0.5), (0, INF), (-1, NAN), (INF, 0)]),
        ("sqrt.rn.f32", [(2, float(np.sqrt(np.float32(2)))), (-0.0, -0.0)]),
        ("rcp.rn.f32", [(3, float(np.float32(1) / np.float32(3))), (-0.0, -INF)]),
        ("rcp.rz.f32", [(1.5, float(np.nextafter(np.float32(2 / 3), np.float32(0))))]),
        ("tanh.approx.f32", [(0, 0), (100, 1), (-INF, -1)]),
        ("neg.f32", [(0.0, -0.0), (NAN, NAN), (INF, -INF)]),
        ("abs.f32", [(-0.0, 0.0), (-INF, INF)]),
        ("cvt.rni.f32.f32", [(2.5, 2), (-3.5, -4), (-0.25, -0.0)]),
        ("cvt.rzi.f32.f32", [(-2.75, -2)]),
        ("cvt.rmi.f32.f32", [(-2.25, -3), (2.75, 2)]),
        ("cvt.rpi.f32.f32", [(2.25, 3), (-2.75, -2)]),
        ("cvt.sat.f32.f32", [(2, 1), (-2, 0), (0.5, 0.5)]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_float32_of_one(name: str, rows: list[tuple[float, float]]) -> None:
    a, expected = (list(column) for column in zip(*rows, strict=True))
    assert same(evaluate(f"{name} y, a;", {"y": "f32"}, {"a": ("f32", a)})["y"], expected)


@pytest.mark.parametrize(
    ("comparison", "expected"),  # of (1, 2), (2, 2), (NaN, 2), (NaN, NaN)
    [
        ("lt", [1, 0, 0, 0]),
        ("ltu", [1, 0, 1, 1]),
        ("eq", [0, 1, 0, 0]),
        ("equ", [0, 1, 1, 1]),
        ("ne", [1, 0, 0, 0]),
        ("neu", [1, 0, 1, 1]),
        ("num", [1, 1, 0, 0]),
        ("nan", [0, 0, 1, 1]),
        ("gtu", [0, 0, 1, 1]),
    ],
)
@pytest.mark.parametrize("kind", ["f32", "f64", "f16"])
def test_comparisons_with_nan(kind: str, comparison: str, expected: list[int]) -> None:
    a, b = (kind, [1, 2, NAN, NAN]), (kind, [2, 2, 2, NAN])
    code = f"setp.{comparison}.{kind} %p0, a, b; selp.u32 y, 1, 0, %p0;"
    assert evaluate(code, {"y": "u32"}, {"a": a, "b": b})["y"][:4].tolist() == expected


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("cvt.rzi.s32.f32", [2.9, -2.9, 3e9, -3e9, NAN], [2, -2, 2**31 - 1, -(2**31), 0]),
        ("cvt.rni.s32.f32", [2.5, 3.5, -2.5, 0.49, -0.5], [2, 4, -2, 0, 0]),
        ("cvt.rmi.s32.f32", [2.9, -2.1, -INF, 0, 1], [2, -3, -(2**31), 0, 1]),
        ("cvt.rpi.s32.f32", [2.1, -2.9, INF, 0, 1], [3, -2, 2**31 - 1, 0, 1]),
        ("cvt.rzi.s8.f32", [300, -300, 5, 0, 1], [127, -128, 5, 0, 1]),
    ],
)
def test_to_integers(name: str, values: list[float], expected: list[int]) -> None:
    found = evaluate(f"{name} y, a;", {"y": "s32"}, {"a": ("f32", values)})["y"]
    assert found[:5].tolist() == expected
    if ".s32." in name:
        unsigned = name.replace(".s32.", ".u32.")
        found = evaluate(f"{unsigned} y, a;", {"y": "u32"}, {"a": ("f32", [-1.5])})["y"]
        assert found[0] == 0


def test_from_integers_rounds_once() -> None:
    code = "cvt.rn.f32.s32 x, a; cvt.rz.f32.s32 y, a; cvt.rn.f32.u64 z, b; cvt.rn.f64.s32 v, a;"
    kinds = {"x": "f32", "y": "f32", "z": "f32", "v": "f64"}
    big = 2**24 + 3
    inputs = {"a": ("s32", [big, -big]), "b": ("u64", [2**60 + 2**36 + 1, 2**63])}
    found = evaluate(code, kinds, inputs)
    assert found["x"][:2].tolist() == [2**24 + 4, -(2**24 + 4)]
    assert found["y"][:2].tolist() == [2**24 + 2, -(2**24 + 2)]
    assert found["z"][:2].tolist() == [2**60 + 2**37, 2**63]
    assert found["v"][0] == big


def awkward_floats() -> np.ndarray:
    """float32 numbers around every rounding that 16-bit and 8-bit formats have."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 1024, dtype=np.uint32)
    half = np.arange(0, 2**16, 61, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)
    near = np.float16(np.linspace(-500, 500, 512)).astype(np.float32)
    small = (generator.standard_normal(512) * 2.0 ** generator.integers(-30, 17, 512)).astype("f4")
    ties = (generator.integers(-4000, 4000, 256) * 2.0**-12).astype(np.float32)
    values = np.concatenate([bits.view(np.float32), half.view(np.float32), near, small, ties])
    return values[: len(values) // 32 * 32]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)], ids=["bf16", "f16"]
)
def test_to_the_nearest_16_bit_float(kind: str, dtype: torch.dtype) -> None:
    """As torch, which has its own code for it, rounds."""
    values = awkward_floats()[:1024]
    found = evaluate(f"cvt.rn.{kind}.f32 y, a;", {"y": "b16"}, {"a": ("f32", values)}, threads=1024)
    expected = torch.from_numpy(values).to(dtype)
    assert _equal(torch.from_numpy(found["y"].view(np.int16)).view(dtype), expected)


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    nan = expected.isnan()
    same_bits = found.view(torch.int16)[~nan] == expected.view(torch.int16)[~nan]
    return bool(same_bits.all() and found.isnan()[nan].all())


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)], ids=["bf16", "f16"]
)
def test_every_16_bit_float_widens(kind: str, dtype: torch.dtype) -> None:
    for start in (0, 0x3C00, 0x7800, 0x8000, 0xFC00):
        codes = np.arange(start, start + 1024, dtype=np.uint16)
        inputs = {"a": ("b16", codes)}
        found = evaluate(f"cvt.f32.{kind} y, a;", {"y": "f32"}, inputs, threads=1024)["y"]
        exact = torch.from_numpy(codes.view(np.int16)).view(dtype).float().numpy()
        assert np.array_equal(found, exact, equal_nan=True)


def test_pairs_put_the_first_operand_above() -> None:
    code = "cvt.rn.bf16x2.f32 x, a, b; cvt.rn.f16x2.f32 y, a, b; cvt.rz.bf16x2.f32 z, a, c;"
    inputs = {"a": ("f32", [1.0]), "b": ("f32", [-2.0]), "c": ("f32", [1 + 2.0**-8 + 2.0**-9])}
    found = evaluate(code, {"x": "b32", "y": "b32", "z": "b32"}, inputs)
    assert [int(v[0]) for v in found.values()] == [0x3F80C000, 0x3C00C000, 0x3F803F80]


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)],
    ids=["e4m3", "e5m2"],
)
def test_8_bit_floats(kind: str, dtype: torch.dtype, most: float) -> None:
    """Saturated where torch makes infinity or NaN; every code widens to what torch makes of it."""
    values = awkward_floats()[1024:2048]
    code = f"cvt.rn.satfinite.{kind}x2.f32 y, a, b;"
    inputs = {"a": ("f32", values), "b": ("f32", values[::-1])}
    found = evaluate(code, {"y": "b16"}, inputs, threads=1024)["y"]
    clamped = torch.from_numpy(values).clamp(-most, most)
    expected = clamped.to(dtype).view(torch.uint8).numpy().astype(np.uint16)
    nan = np.isnan(values)
    assert np.array_equal((found >> 8)[~nan], expected[~nan])
    assert np.array_equal((found & 255)[~nan[::-1]], expected[::-1][~nan[::-1]])
    assert set((found >> 8)[nan]) == {0x7F}
    codes = np.arange(256, dtype=np.uint16)
    code = f"cvt.rn.f16x2.{kind}x2 y, a;"
    found = evaluate(code, {"y": "b32"}, {"a": ("b16", codes << 8)}, threads=256)["y"]
    exact = torch.from_numpy(codes.astype(np.uint8)).view(dtype).float().numpy()
    half = (found >> 16).astype(np.uint16).view(np.float16).astype(np.float32)
    assert np.array_equal(half, exact, equal_nan=True)


def test_tf32_keeps_ten_bits_ties_away_from_zero() -> None:
    values = [1 + 2.0**-11, -(1 + 2.0**-11), 1 + 2.0**-12, 1 + 2.0**-10 + 2.0**-11]
    found = evaluate("cvt.rna.tf32.f32 y, a;", {"y": "f32"}, {"a": ("f32", values)})["y"]
    assert found[:4].tolist() == [1 + 2.0**-10, -(1 + 2.0**-10), 1, 1 + 2.0**-9]


def bf16(*values: float) -> list[int]:
    return torch.tensor(values).bfloat16().view(torch.int16).numpy().view(np.uint16).tolist()


@pytest.mark.parametrize(
    ("code", "values", "expected"),
    [
        ("add.bf16 y, a, b;", (1.0, 2.0**-9, 0), 1.0),  # to even
        ("add.rn.bf16 y, a, b;", (1.0078125, 2.0**-8, 0), 1.015625),  # to even, upwards
        ("fma.rn.bf16 y, a, b, c;", (3.0, 5.0, 2.0**-10), 15.0),
        ("fma.rn.bf16 y, a, b, c;", (1.0078125, 1.0078125, -1.015625), 2.0**-14),
        ("mul.bf16 y, a, b;", (1e30, -1e30, 0), -INF),
        ("min.bf16 y, a, b;", (NAN, 2.0, 0), 2.0),
        ("max.NaN.bf16 y, a, b;", (NAN, 2.0, 0), NAN),
        ("neg.bf16 y, a;", (0.0, 0, 0), -0.0),
        ("abs.bf16 y, a;", (-3.0, 0, 0), 3.0),
        ("fma.rn.relu.bf16 y, a, b, c;", (-3.0, 5.0, 1.0), 0.0),
    ],
)
def test_bfloat16(code: str, values: tuple[float, float, float], expected: float) -> None:
    a, b, c = (("b16", bf16(x)) for x in values)
    found = evaluate(code, {"y": "b16"}, {"a": a, "b": b, "c": c})["y"][:1]
    widened = (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert same(widened, [expected])


def test_pairs_of_16_bits_do_not_mix() -> None:
    low, high = bf16(1.5, -2.0), bf16(0.25, 8.0)
    pairs = [low[i] | high[i] << 16 for i in range(2)]
    code = "add.rn.bf16x2 y, a, b; setp.lt.bf16x2 %p0|%p1, a, b; selp.u32 l, 1, 0, %p0;"
    code += "selp.u32 h, 1, 0, %p1;"
    inputs = {"a": ("b32", [pairs[0]]), "b": ("b32", [pairs[1]])}
    found = evaluate(code, {"y": "b32", "l": "u32", "h": "u32"}, inputs)
    assert [int(v[0]) for v in found.values()] == [bf16(-0.5)[0] | bf16(8.25)[0] << 16, 0, 1]


def test_float64_and_immediates() -> None:
    code = "fma.rn.f64 y, a, 0d4000000000000000, 0d3FF0000000000000; mov.f32 x, 0fBFC00000;"
    found = evaluate(code, {"y": "f64", "x": "f32"}, {"a": ("f64", [1e-17, 3.0])})
    assert found["y"][:2].tolist() == [1.0, 7.0] and found["x"][0] == -1.5


def test_testp_tells_what_a_number_is() -> None:
    values = [1.0, INF, NAN, TINY, 0.0]
    for kind, expected in (
        ("finite", [1, 0, 0, 1, 1]),
        ("infinite", [0, 1, 0, 0, 0]),
        ("notanumber", [0, 0, 1, 0, 0]),
        ("subnormal", [0, 0, 0, 1, 0]),
        ("normal", [1, 0, 0, 0, 0]),
    ):
        code = f"testp.{kind}.f32 %p0, a; selp.u32 y, 1, 0, %p0;"
        found = evaluate(code, {"y": "u32"}, {"a": ("f32", values)})["y"]
        assert found[:5].tolist() == expected
