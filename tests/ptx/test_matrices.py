"""Fragments of matrix instructions, by where each element is: the layouts the other way round."""

import numpy as np
import ptx
import pytest
import torch
from ptx.snippet import evaluate
from torch import Tensor

BITS = {"bf16": 16, "f16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8}
DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def rounded(x: Tensor, kind: str) -> Tensor:
    if kind == "tf32":
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return x.to(DTYPES[kind])


def codes(x: Tensor) -> np.ndarray:
    """Elements as integers."""
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(ints).numpy().astype(np.int64) & ((1 << 8 * x.element_size()) - 1)


def words_of(x: Tensor, place, registers: int) -> list[np.ndarray]:
    """Registers of 32 lanes: `place` says lane, register and position of an element."""
    words = np.zeros((registers, 32), np.int64)
    bits = 8 * x.element_size()
    for (i, j), code in np.ndenumerate(codes(x)):
        lane, register, position = place(i, j)
        words[register, lane] |= code << bits * position
    return [w.astype(np.uint32) for w in words]


def a_place(per: int):
    """Of A[16][k]: rows 8 apart and columns 4 `per` apart are in other registers."""
    return lambda i, k: (
        i % 8 * 4 + k % (4 * per) // per,
        i // 8 + 2 * (k // (4 * per)),
        k % per,
    )


def b_place(per: int):
    return lambda k, j: (j * 4 + k % (4 * per) // per, k // (4 * per), k % per)


def d_place(i: int, j: int) -> tuple[int, int]:
    """Lane and register of an accumulator in a tile of 8 columns."""
    return i % 8 * 4 + j % 8 // 2, j % 2 + 2 * (i // 8) + 4 * (j // 8)


@pytest.mark.parametrize(
    ("shape", "kind", "k"),
    [
        ("m16n8k16", "bf16", 16),
        ("m16n8k8", "bf16", 8),
        ("m16n8k16", "f16", 16),
        ("m16n8k8", "tf32", 8),
        ("m16n8k4", "tf32", 4),
        ("m16n8k32", "e4m3", 32),
        ("m16n8k32", "e5m2", 32),
    ],
)
def test_mma(shape: str, kind: str, k: int) -> None:
    torch.manual_seed(0)
    a, b, c = (torch.randn(s) for s in ((16, k), (k, 8), (16, 8)))
    a, b = rounded(a, kind), rounded(b, kind)
    per = 32 // BITS[kind]
    words = k * BITS[kind] // 128
    inputs: dict[str, tuple[str, np.ndarray]] = {}
    for name, values in (
        ("a", words_of(a, a_place(per), 2 * words)),
        ("b", words_of(b, b_place(per), words)),
    ):
        inputs |= {f"{name}{i}": ("u32", v) for i, v in enumerate(values)}
    for r in range(4):
        lanes = [0.0] * 32
        for i in range(16):
            for j in range(8):
                if d_place(i, j)[1] == r:
                    lanes[d_place(i, j)[0]] = float(c[i, j])
        inputs[f"c{r}"] = ("f32", lanes)

    def listed(name: str, count: int) -> str:
        return "{" + ", ".join(f"{name}{i}" for i in range(count)) + "}"

    lists = listed("d", 4), listed("a", 2 * words), listed("b", words), listed("c", 4)
    code = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {', '.join(lists)};"
    found = evaluate(code, {f"d{i}": "f32" for i in range(4)}, inputs)
    exact = c.double() + a.double() @ b.double()
    for i in range(16):
        for j in range(8):
            lane, register = d_place(i, j)
            assert found[f"d{register}"][lane] == pytest.approx(float(exact[i, j]), abs=1e-5)


def test_mma_accumulates_in_float16() -> None:
    a = torch.full((16, 16), 0.5).half()
    b = torch.eye(16, 8).half() * 2
    inputs = {f"a{i}": ("u32", w) for i, w in enumerate(words_of(a, a_place(2), 4))}
    inputs |= {f"b{i}": ("u32", w) for i, w in enumerate(words_of(b, b_place(2), 2))}
    code = """mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {d0, d1}, {a0, a1, a2, a3},
    {b0, b1}, {%r0, %r1};"""
    found = evaluate("mov.b32 %r0, 0x40004000; mov.b32 %r1, 0;" + code,
                     {"d0": "b32", "d1": "b32"}, inputs)  # fmt: skip
    assert set(found["d0"]) == {0x42004200} and set(found["d1"]) == {0x3C003C00}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Element (r, c) of a matrix, or (c, r), is in lane 4 r + c / 2, lower half first."""
    registers = ", ".join(f"d{i}" for i in range(count))
    suffix = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    # Matrix i has its rows 16 bytes apart from 128 i on; lane l fills bytes 16 l with its codes.
    fill = "".join(
        f"mad.lo.u32 %r1, %t, 8, {2 * k}; mad.lo.u32 %r2, %t, 8, {2 * k + 1}; shl.b32 %r2, %r2, 16;"
        f"or.b32 %r1, %r1, %r2; st.shared.b32 [%r0+{4 * k}], %r1;"
        for k in range(4)
    )
    code = f"""mov.u32 %r0, memory; mad.lo.u32 %r0, %t, 16, %r0; {fill} bar.warp.sync -1;
    ldmatrix.sync.aligned.{suffix} {{{registers}}}, [%r0]; bar.warp.sync -1;
    add.u32 %r3, %r0, 512; stmatrix.sync.aligned.{suffix} [%r3], {{{registers}}};
    bar.warp.sync -1; ld.shared.v4.b32 {{s0, s1, s2, s3}}, [%r3];"""
    kinds = {**{f"d{i}": "b32" for i in range(count)}, **{f"s{i}": "b32" for i in range(4)}}
    found = evaluate(code, kinds, shared=1024)
    for i in range(count):
        for r in range(8):
            for c in range(8):
                word = int(found[f"d{i}"][4 * r + c // 2]) >> 16 * (c % 2) & 0xFFFF
                row, column = (c, r) if transposed else (r, c)
                assert word == 64 * i + 8 * row + column
    stored = np.stack([found[f"s{i}"] for i in range(4)], 1)[: 8 * count].astype("<u4")
    assert stored.view(np.uint16).reshape(-1).tolist() == list(range(64 * count))


def test_movmatrix_transposes() -> None:
    code = """mad.lo.u32 %r1, %t, 2, 1; shl.b32 %r1, %r1, 16; mad.lo.u32 %r2, %t, 2, %r1;
    movmatrix.sync.aligned.m8n8.trans.b16 y, %r2;"""
    found = evaluate(code, {"y": "b32"})["y"]
    for r in range(8):
        for c in range(8):
            assert int(found[4 * r + c // 2]) >> 16 * (c % 2) & 0xFFFF == 8 * c + r


def descriptor(start: str, leading: int, stride: int, swizzle: int) -> str:
    """%w0 becomes the descriptor of a tile at the shared address in register `start`."""
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    upper = leading >> 4 << 16 | stride >> 4 << 32 | mode << 62
    return f"""and.b32 %r90, {start}, 0x3ffff; shr.u32 %r90, %r90, 4; cvt.u64.u32 %w0, %r90;
    or.b64 %w0, %w0, {upper};"""


def shared_tile(x: Tensor, swizzle: int, along_k: bool) -> tuple[bytes, int, int]:
    """Bytes of x [rows][K] (or [K][rows]) as wgmma reads it, and the two offsets.

    Written as the manual describes it: cores of 8 rows of 16 bytes; with a swizzle, rows of
    `swizzle` bytes whose 16-byte parts are exchanged by the number of the row.
    """
    size = x.element_size()
    outer, inner = x.shape  # along_k: rows and K, else K and rows
    data = codes(x)
    memory = np.zeros(outer * inner * size, np.uint8)

    def put(address: int, code: int) -> None:
        for byte in range(size):
            memory[address + byte] = code >> 8 * byte & 255

    if swizzle == 0:
        # Cores one after the other, of the rows of one 16-byte column first.
        cores = outer // 8
        for (i, j), code in np.ndenumerate(data):
            column, within = divmod(j * size, 16)
            put(column * cores * 128 + i // 8 * 128 + i % 8 * 16 + within, int(code))
        between_columns, between_rows = cores * 128, 128
        if along_k:
            return memory.tobytes(), between_columns, between_rows
        return memory.tobytes(), between_rows, between_columns
    # Panels of `swizzle` bytes width, each with all outer rows.
    panel = outer * swizzle
    for (i, j), code in np.ndenumerate(data):
        number, within = divmod(j * size, swizzle)
        part, rest = divmod(within, 16)
        pattern = {128: i % 8, 64: i // 2 % 4, 32: i // 4 % 2}[swizzle]
        put(number * panel + i * swizzle + (part ^ pattern) * 16 + rest, int(code))
    return memory.tobytes(), panel, 8 * swizzle


@pytest.mark.parametrize(
    ("kind", "n", "swizzle_a", "a_along_k", "swizzle_b", "b_along_k"),
    [
        ("bf16", 64, 0, True, 0, True),
        ("bf16", 24, 32, True, 64, True),
        ("f16", 256, 64, True, 128, False),
        ("bf16", 32, 128, False, 64, False),
        ("bf16", 16, 0, False, 32, False),
        ("bf16", 16, 32, False, 0, False),
        ("tf32", 32, 32, True, 0, True),
        ("e4m3", 16, 0, True, 32, True),
    ],
)
def test_wgmma(
    kind: str, n: int, swizzle_a: int, a_along_k: bool, swizzle_b: int, b_along_k: bool
) -> None:
    """D[64][n] += A[64][K] B[K][n], K being 32 bytes, both out of shared memory."""
    torch.manual_seed(1)
    k = 256 // BITS[kind]
    a, b = rounded(torch.randn(64, k), kind), rounded(torch.randn(n, k), kind)

    # The least tile along K that has the swizzle: what is beyond K is not read.
    def tile(x: Tensor, swizzle: int, along_k: bool) -> tuple[bytes, int, int]:
        if not along_k:
            return shared_tile(x.T.contiguous(), swizzle, False)
        wide = max(swizzle, 32) // x.element_size()
        padded = torch.zeros(x.shape[0], wide).to(x.dtype)
        padded[:, : x.shape[1]] = x
        return shared_tile(padded, swizzle, True)

    left, leading_a, stride_a = tile(a, swizzle_a, a_along_k)
    right, leading_b, stride_b = tile(b, swizzle_b, b_along_k)
    count = n // 2
    registers = [f"d{i}" for i in range(count)]
    transposes = "" if BITS[kind] != 16 else f", {int(not a_along_k)}, {int(not b_along_k)}"
    at_b = -(-len(left) // 1024) * 1024
    body = f"""
    .reg .pred %p<4>; .reg .b32 %r<100>, d<{count}>; .reg .b64 %w<20>;
    mov.u32 %r0, %tid.x; mov.u32 %r1, memory; add.u32 %r2, %r1, {at_b};
    setp.ne.u32 %p1, %r0, 0; @%p1 bra loaded;
    mbarrier.init.shared::cta.b64 [barrier], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [barrier], {len(left) + len(right)};
    ld.param.u64 %w5, [left]; ld.param.u64 %w6, [right];
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%w5], {len(left)},
        [barrier];
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%w6], {len(right)},
        [barrier];
    loaded: bar.sync 0;
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [barrier], 0; @!%p2 bra wait;
    {descriptor("%r1", leading_a, stride_a, swizzle_a)} mov.b64 %w1, %w0;
    {descriptor("%r2", leading_b, stride_b, swizzle_b)}
    {" ".join(f"mov.b32 {d}, 0f3F800000;" for d in registers)}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {{{", ".join(registers)}}},
        %w1, %w0, 1, 1, 1{transposes};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    ld.param.u64 %w7, [out]; mad.wide.u32 %w7, %r0, {4 * count}, %w7;
    {" ".join(f"st.global.b32 [%w7+{4 * i}], {d};" for i, d in enumerate(registers))}
    ret;"""
    declared = ".extern .shared .align 1024 .b8 memory[];\n.shared .align 8 .b64 barrier;"
    kernel = ptx.Kernel(ptx.snippet.module(["left", "right", "out"], body, declared))
    out = torch.full((128, count), float("nan"))
    buffers = [torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (left, right)]
    kernel.launch((1,), 128, [*buffers, out], shared=at_b + len(right))
    exact = 1 + a.double() @ b.double().T
    for i in range(64):
        for j in range(n):
            lane, register = d_place(i % 16, j)
            found = out[i // 16 * 32 + lane, register].item()
            assert found == pytest.approx(float(exact[i, j]), abs=1e-4)
