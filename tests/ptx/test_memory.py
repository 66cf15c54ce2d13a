"""State spaces, bounds, atomics, and copies that finish as late as they may."""

import re
import struct

import numpy as np
import ptx
import pytest
import torch
from ptx.snippet import evaluate, module

NAN = float("nan")


def fault(match: str) -> "pytest.RaisesExc[Exception]":
    return pytest.raises(ptx.core().Fault, match=match)


def launch(body: str, *args: ptx.Argument, threads: int = 32, **options: object) -> ptx.Kernel:
    """Runs `body`, which finds its arguments' addresses in a0, a1 and so on."""
    names = [f"a{i}" for i in range(len(args))]
    loads = "".join(f"ld.param.u64 %a{i}, [a{i}];" for i in range(len(args)))
    declared = f".reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %w<99>, %a<{len(args) + 1}>;"
    memory = ".extern .shared .align 1024 .b8 memory[];\n.shared .align 8 .b64 bar;"
    kernel = ptx.Kernel(module(names, f"{declared}\nmov.u32 %r0, %tid.x;\n{loads}\n{body}", memory))
    kernel.launch((1,), threads, args, **options)
    return kernel


@pytest.mark.parametrize(("offset", "found"), [(-4, "0 bytes"), (128, "128 bytes into one of 128")])
def test_global_memory_has_bounds(offset: int, found: str) -> None:
    x = torch.zeros(3, 32)[1]
    with fault("outside every buffer" if offset < 0 else found):
        launch(f"ld.global.b32 %r1, [%a0+{offset}];", x)
    launch(
        f"mov.u32 %r2, {offset}; setp.eq.u32 %p0, %r2, 0; @%p0 ld.global.b32 %r1, [%a0+8192];", x
    )


def test_the_bytes_between_a_views_rows_are_its_own() -> None:
    """A view may be read from its first element to its last, and no further."""
    x = torch.zeros(4, 16)[:, :8]
    launch("ld.global.b32 %r1, [%a0+220];", x)
    with fault("outside every buffer"):
        launch("ld.global.b32 %r1, [%a0+224];", x)


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("ld.global.b64 %w1, [%a0+4];", "8 bytes at .* not aligned"),
        ("mov.u32 %r1, memory; ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r1+8];", "16 bytes at"),
        ("mov.u32 %r1, memory; st.shared.b32 [%r1+256], %r1;", "shared memory at .* outside"),
        ("mov.u32 %r1, 0; st.shared.b32 [%r1], %r1;", "shared memory at 0x0"),
        ("mov.u64 %w1, 0; ld.b32 %r1, [%w1];", "global memory at 0x0"),
        ("ld.param.b64 %w1, [a0+1024];", "kernel parameter"),
        ("trap;", "trapped"),
    ],
)
def test_bad_accesses_are_faults(code: str, match: str) -> None:
    with fault(match):
        launch(code, torch.zeros(64), shared=256)


def test_a_fault_says_where() -> None:
    with fault(r"\(CTA 0,0,0, warp 1\)\s+at @%p0 trap;"):
        launch("setp.eq.u32 %p0, %r0, 40; @%p0 trap;", threads=64)


def test_generic_addresses_reach_every_space() -> None:
    code = """cvta.shared.u64 %w1, %w9; st.b32 [%w1], 5; ld.shared.b32 %r1, [%r9];
    cvta.to.shared.u64 %w2, %w1; cvt.u32.u64 %r2, %w2; ld.shared.b32 %r2, [%r2];
    mov.u64 %w3, scratch; cvta.local.u64 %w4, %w3; st.local.b32 [%w3+8], %r0;
    ld.b32 %r3, [%w4+8]; isspacep.shared %p1, %w1; isspacep.global %p2, %w1;
    mad.lo.u32 %r4, %r1, 100, %r3; selp.u32 %r5, 1, 0, %p1; selp.u32 %r6, 1, 0, %p2;
    mad.wide.u32 %w5, %r0, 16, %a0; st.global.v4.b32 [%w5], {%r4, %r2, %r5, %r6};"""
    out = torch.zeros(32, 4, dtype=torch.int32)
    prefix = ".local .align 16 .b8 scratch[16]; mov.u32 %r9, memory; cvt.u64.u32 %w9, %r9;"
    launch(prefix + code, out, shared=64)
    assert out.tolist() == [[500 + t, 5, 1, 0] for t in range(32)]


def test_constants_of_a_module_are_loaded() -> None:
    text = module(
        ["out"],
        """.reg .b32 %r<9>; .reg .b64 %w<9>; mov.u32 %r0, %tid.x; ld.param.u64 %w0, [out];
        and.b32 %r1, %r0, 3; mov.u64 %w1, table; mad.wide.u32 %w1, %r1, 2, %w1;
        ld.const.s16 %r2, [%w1]; mad.wide.u32 %w0, %r0, 4, %w0; st.global.b32 [%w0], %r2;""",
        ".const .align 2 .b16 table[4] = {1, 65535, 0x10, 7};",
    )
    out = torch.zeros(32, dtype=torch.int32)
    ptx.Kernel(text).launch((1,), 32, [out])
    assert out.tolist() == [1, -1, 16, 7] * 8


def test_narrow_loads_extend_and_stores_cut() -> None:
    x = torch.arange(-128, 128, 2, dtype=torch.int8)
    y = torch.zeros(32, 2, dtype=torch.int64)
    z = torch.zeros(32, 4, dtype=torch.uint8)
    code = """mad.wide.u32 %w1, %r0, 4, %a0; ld.global.v4.s8 {%r1, %r2, _, _}, [%w1];
    ld.global.nc.L1::evict_last.u8 %w2, [%w1]; ld.global.s8 %w3, [%w1];
    mad.wide.u32 %w4, %r0, 16, %a1; st.global.v2.b64 [%w4], {%w2, %w3};
    mad.wide.u32 %w5, %r0, 4, %a2; shl.b32 %r3, %r1, 8;
    st.global.v4.b8 [%w5], {%r1, %r2, %r3, 9};"""
    launch(code, x, y, z)
    assert y[:, 0].tolist() == [int(v) & 255 for v in x[::4]]
    assert y[:, 1].tolist() == x[::4].tolist()
    codes = x.view(torch.uint8).reshape(32, 4).tolist()
    assert z.tolist() == [[v, w, 0, 9] for v, w, _, _ in codes]


def test_a_struct_is_a_parameter() -> None:
    text = module([], "").replace(
        "snippet()", "snippet(.param .align 8 .b8 given[24], .param .u64 out)"
    )
    body = """.reg .b32 %r<9>; .reg .b64 %w<9>; ld.param.b64 %w0, [given+8];
    ld.param.f32 %r1, [given+16]; ld.param.u64 %w1, [out]; ld.global.b32 %r2, [%w0];
    add.f32 %r2, %r2, %r1;
    st.global.b32 [%w1], %r2; ret;"""
    x, y = torch.tensor([2.5]), torch.zeros(1)
    packed = struct.pack("<qQff", 7, x.data_ptr(), 0.25, 0)
    kernel = ptx.Kernel(text.replace("{\n\n}", f"{{{body}}}"))
    with fault("outside every buffer"):
        kernel.launch((1,), 1, [packed, y])
    kernel.launch((1,), 1, [packed, y], memory=[x])
    assert y.item() == 2.75


@pytest.mark.parametrize(
    ("code", "start", "final", "old"),
    [
        ("atom.global.add.u32 %r1, [%a0], 2;", 5, 69, 5),
        ("atom.shared.max.s32 %r1, [%r9], %r0;", -4, 31, -4),
        ("atom.global.inc.u32 %r1, [%a0], 9;", 0, 2, 0),
        ("atom.global.exch.b32 %r1, [%a0], 3;", 1, 3, 1),
        ("atom.global.cas.b32 %r1, [%a0], 8, 6;", 8, 6, 8),
        ("atom.global.and.b32 %r1, [%a0], 6;", 15, 6, 15),
        ("red.global.gpu.relaxed.or.b32 [%a0], %r0; mov.u32 %r1, 0;", 64, 95, 0),
        ("atom.global.xor.b32 %r1, [%a0], 1;", 8, 8, 8),
        ("atom.global.dec.u32 %r1, [%a0], 40;", 31, 40, 31),
    ],
)
def test_atomics(code: str, start: int, final: int, old: int) -> None:
    """Of 32 lanes one after the other, in an order that is drawn."""
    x = torch.tensor([start], dtype=torch.int32)
    seen = torch.full((32,), -9, dtype=torch.int32)
    shared = ".shared." in code
    before = "mov.u32 %r9, memory; ld.global.b32 %r2, [%a0]; st.shared.b32 [%r9], %r2;"
    after = "ld.shared.b32 %r3, [%r9]; st.global.b32 [%a0], %r3;" if shared else ""
    stores = "mad.wide.u32 %w1, %r0, 4, %a1; st.global.b32 [%w1], %r1;"
    launch(f"{before} {code} bar.warp.sync -1; {after} {stores}", x, seen, shared=16)
    assert x.item() == final and old in seen.tolist()


def test_atomic_floats() -> None:
    x, y = torch.tensor([0.5]), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    code = """cvt.rn.f32.u32 %r1, %r0; red.global.add.f32 [%a0], %r1;
    mov.b32 %r2, 0x3f803f00; red.global.add.noftz.bf16x2 [%a1], %r2;
    red.global.v2.f32.add [%a2], {%r1, %r1};"""
    z = torch.zeros(2)
    launch(code.replace("red.global.v2.f32.add", "red.global.add.v2.f32"), x, y, z)
    assert x.item() == 496.5 and y.tolist() == [17.0, 34.0] and z.tolist() == [496.0, 496.0]


def test_a_sum_of_atomics_has_no_fixed_order() -> None:
    values = torch.tensor([1e8, 1.0, -1e8] + [0.25] * 29)
    sums = set()
    for seed in range(12):
        total = torch.zeros(1)
        code = """mad.wide.u32 %w1, %r0, 4, %a0; ld.global.b32 %r1, [%w1];
        red.global.add.f32 [%a1], %r1;"""
        launch(code, values, total, seed=seed)
        sums.add(total.item())
    assert len(sums) > 1


# A copy of 16 bytes for each lane, and the same bytes read back.
COPY = """mov.u32 %r1, memory; mad.lo.u32 %r1, %r0, 16, %r1; mad.wide.u32 %w1, %r0, 16, %a0;
cp.async.cg.shared.global [%r1], [%w1], 16{size}; {wait}
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1]; mad.wide.u32 %w2, %r0, 16, %a1;
st.global.v4.b32 [%w2], {{%r4, %r5, %r6, %r7}}; cp.async.wait_all;"""


@pytest.mark.parametrize(
    ("wait", "arrives"),
    [
        ("cp.async.commit_group; cp.async.wait_group 0;", True),
        ("cp.async.wait_all;", True),
        ("cp.async.commit_group; cp.async.wait_group 1;", False),
        ("cp.async.wait_group 0;", False),  # of no group: it was not committed
        ("", False),
    ],
)
def test_cp_async_arrives_when_its_group_is_waited_for(wait: str, arrives: bool) -> None:
    for completion in ("late", "early"):
        x, y = torch.randn(32, 4), torch.zeros(32, 4)
        launch(COPY.format(size="", wait=wait), x, y, shared=512, completion=completion)
        assert torch.equal(x, y) == (arrives or completion == "early")


def test_cp_async_fills_with_zeros() -> None:
    x, y = torch.randn(32, 4), torch.zeros(32, 4)
    size = "setp.lt.u32 %p0, %r0, 5; selp.u32 %r9, 16, 4, %p0;"
    launch(size + COPY.format(size=", %r9", wait="cp.async.wait_all;"), x, y, shared=512)
    assert torch.equal(y[:5], x[:5]) and torch.equal(y[5:, 0], x[5:, 0]) and not y[5:, 1:].any()


def test_cp_async_tells_an_mbarrier() -> None:
    wait = """mov.u32 %r3, bar; setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 32; bar.sync 0;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r3];
    again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; @!%p2 bra again;"""
    init_first = COPY.format(size="", wait=wait)
    x, y = torch.randn(32, 4), torch.zeros(32, 4)
    launch(init_first, x, y, shared=512)
    assert torch.equal(x, y)


def test_shared_memory_starts_as_nan() -> None:
    found = evaluate("mov.u32 %r0, memory; ld.shared.f32 y, [%r0];", {"y": "f32"}, shared=16)
    assert np.isnan(found["y"]).all()


MBARRIER = (
    "mov.u32 %r9, bar; setp.eq.u32 %p9, %r0, 0; @%p9 mbarrier.init.shared::cta.b64 [%r9], {};"
)


def run_mbarrier(count: int, code: str, threads: int = 32, **options: object) -> list[int]:
    body = f".reg .pred %p9; {MBARRIER.format(count)} bar.sync 0; {code}"
    out = torch.full((threads,), -1, dtype=torch.int32)
    body += "mad.wide.u32 %w1, %r0, 4, %a0; st.global.b32 [%w1], %r1;"
    launch(body, out, threads=threads, **options)
    return out.tolist()


def test_phases_of_an_mbarrier_and_their_parities() -> None:
    """Three arrivals end phase 0; parity 1 is of the phase before it, which is over."""

    def ask(parity: int, to: str) -> str:
        test = f"mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r9], {parity};"
        return f"{test} selp.u32 {to}, 1, 0, %p1;"

    code = f"""@!%p9 bra end; {ask(1, "%r2")} {ask(0, "%r3")}
    mbarrier.arrive.shared::cta.b64 %w2, [%r9], 2; {ask(0, "%r4")}
    mbarrier.arrive.shared::cta.b64 %w3, [%r9]; {ask(0, "%r5")} {ask(1, "%r6")}
    mbarrier.test_wait.shared::cta.b64 %p1, [%r9], %w2; selp.u32 %r7, 1, 0, %p1;
    mad.lo.u32 %r1, %r2, 10, %r3; mad.lo.u32 %r1, %r1, 10, %r4; mad.lo.u32 %r1, %r1, 10, %r5;
    mad.lo.u32 %r1, %r1, 10, %r6; mad.lo.u32 %r1, %r1, 10, %r7; end:"""
    assert run_mbarrier(3, code)[0] == 100101


def test_too_many_arrivals() -> None:
    with fault("more arrivals at an mbarrier than the 31"):
        run_mbarrier(31, "@%p9 mbarrier.arrive.shared::cta.b64 _, [%r9], 32;")


def test_an_mbarrier_waits_for_its_bytes() -> None:
    code = """@%p9 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 64;
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r9], 0; selp.u32 %r1, 1, 0, %p1;
    @%p9 mbarrier.complete_tx.shared::cta.b64 [%r9], 64; bar.warp.sync -1;
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r9], 0; selp.u32 %r2, 2, 0, %p1;
    add.u32 %r1, %r1, %r2;"""
    assert set(run_mbarrier(1, code)) == {2}


def test_a_missing_arrival_is_a_deadlock() -> None:
    code = "again: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0; @!%p1 bra again;"
    with fault("deadlock"):
        run_mbarrier(1, code)


def test_an_mbarrier_must_have_been_made() -> None:
    with fault("there is no mbarrier at"):
        run_mbarrier(1, "mbarrier.arrive.shared::cta.b64 _, [%r9+8];", shared=64)


# Lines of bytes to shared memory and back.
LINE = """.reg .pred %p9; mov.u32 %r9, bar; mov.u32 %r1, memory; setp.eq.u32 %p9, %r0, 0; @!%p9 ret;
mbarrier.init.shared::cta.b64 [%r9], 1;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {expected};
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%a0], 64, [%r9];
{wait}
{change}
{store} [%a1], [%r1], 64;
cp.async.bulk.commit_group; {finish}"""
WAIT = "again: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0; @!%p1 bra again;"
STORE = "cp.async.bulk.global.shared::cta.bulk_group"


def line(
    wait: str = WAIT,
    change: str = "",
    finish: str = "cp.async.bulk.wait_group 0;",
    store: str = STORE,
    expected: int = 64,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.arange(16.0), torch.full((16,), 0.5)
    body = LINE.format(wait=wait, change=change, finish=finish, store=store, expected=expected)
    launch(body, x, y, shared=64, **options)
    return x, y


@pytest.mark.parametrize("completion", ["late", "early", "random"])
def test_bulk_lines(completion: str) -> None:
    x, y = line(completion=completion)
    assert torch.equal(x, y)


def test_bulk_lines_are_added() -> None:
    x, y = line(store="cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32")
    assert torch.equal(y, x + 0.5)


def test_what_was_not_waited_for_has_not_arrived() -> None:
    with fault("exits with 1 bulk copies"):
        line(wait="")


def test_too_few_expected_bytes_never_end_the_phase() -> None:
    with fault("deadlock"):
        line(expected=32)


def test_a_threads_write_reaches_a_bulk_copy_after_a_fence() -> None:
    write = "mov.b32 %r4, 0f42C80000; st.shared.b32 [%r1], %r4;"
    assert line(change=write)[1][0] == 0  # the copy sees what TMA brought
    assert line(change=write + "fence.proxy.async.shared::cta;")[1][0] == 100


@pytest.mark.parametrize(("need", "seen"), [(True, False), (False, True)])
def test_what_cp_async_brought_reaches_a_bulk_copy_after_a_fence(need: bool, seen: bool) -> None:
    copy = "cp.async.cg.shared.global [%r1], [%a0+16], 16; cp.async.wait_all;"
    assert (line(change=copy, copies_need_fence=need)[1][0] == 4) == seen
    assert line(change=copy + "fence.proxy.async;", copies_need_fence=need)[1][0] == 4


def test_a_store_must_have_read_before_the_cta_exits() -> None:
    with fault("exits before its bulk stores have read"):
        line(finish="")
    assert torch.equal(*line(finish="cp.async.bulk.wait_group.read 0;"))


def test_a_store_reads_late() -> None:
    overwrite = "st.shared.b32 [%r1+4], 0; fence.proxy.async;"
    early = f"cp.async.bulk.wait_group.read 0; {overwrite} cp.async.bulk.wait_group 0;"
    assert line(finish=early)[1][1] == 1
    late = f"{overwrite} cp.async.bulk.wait_group 0;"
    assert line(finish=late)[1][1] == 0


def tensor_body(rank: int, coordinates: str) -> str:
    return f""".reg .pred %p9; mov.u32 %r9, bar; mov.u32 %r1, memory; setp.eq.u32 %p9, %r0, 0;
    @!%p9 ret; mbarrier.init.shared::cta.b64 [%r9], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], %r20;
    cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        [%r1], [%w8, {coordinates}], [%r9];
    {WAIT}"""


def run_tensor(
    source: ptx.TensorMap, size: int, body: str, *args: ptx.Argument, shared: int = 4096
) -> None:
    names = ["out", *(f"m{i}" for i in range(len(args) - 1))]
    maps = "".join(f", .param .align 64 .b8 {n}[128]" for n in names[1:])
    text = module([], body).replace(
        "snippet()", f"snippet(.param .align 64 .b8 map[128], .param .u64 out{maps})"
    )
    declared = f""".reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %w<99>; mov.u32 %r0, %tid.x;
    mov.u32 %r20, {size}; mov.b64 %w7, map; cvta.param.u64 %w8, %w7; ld.param.u64 %w9, [out];
    mov.b64 %w6, m0; cvta.param.u64 %w6, %w6;"""
    memory = ".extern .shared .align 1024 .b8 memory[];\n.shared .align 8 .b64 bar;"
    text = text.replace(
        "{\n", "{\n" + (declared if len(args) > 1 else declared.rsplit("\n", 1)[0]), 1
    )
    ptx.Kernel(text.replace(".visible", memory + "\n.visible")).launch(
        (1,), 32, [source, *args], shared=shared
    )


# What shared memory holds, as words.
DUMP = """mov.u32 %r3, 0; more: add.u32 %r4, %r1, %r3; ld.shared.b32 %r5, [%r4];
cvt.u64.u32 %w1, %r3; add.s64 %w1, %w1, %w9; st.global.b32 [%w1], %r5;
add.u32 %r3, %r3, 4; setp.lt.u32 %p2, %r3, %r20; @%p2 bra more; ret;"""


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_a_swizzled_tile(swizzle: int) -> None:
    """The 16-byte parts of a row are exchanged by bits of the row's number."""
    columns = swizzle // 4
    x = torch.arange(16 * 40, dtype=torch.int32).reshape(16, 40)
    out = torch.full((16, columns), -1, dtype=torch.int32)
    tensor_map = ptx.TensorMap(x, (columns, 16), swizzle)
    run_tensor(tensor_map, 16 * swizzle, tensor_body(2, "{4, 0}") + DUMP, out)
    for row in range(16):
        pattern = {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2}[swizzle]
        for part in range(swizzle // 16):
            expected = x[row, 4 + 4 * part : 8 + 4 * part].tolist()
            at = 4 * (part ^ pattern)
            if 4 + 4 * part + 4 <= 40:
                assert out[row, at : at + 4].tolist() == expected


def test_a_box_beyond_the_tensor_is_zero_and_is_not_written() -> None:
    x = torch.arange(1, 61, dtype=torch.int32).reshape(3, 5, 4)
    out = torch.full((2, 2, 4), -1, dtype=torch.int32)
    tensor_map = ptx.TensorMap(x, (4, 2, 2))
    run_tensor(tensor_map, 64, tensor_body(3, "{0, 4, -1}") + DUMP, out)
    assert out[0].eq(0).all() and out[1, 1].eq(0).all()
    assert out[1, 0].tolist() == x[0, 4].tolist()
    back = torch.zeros_like(x)
    store = """cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%w6, {0, 4, 2}], [%r1];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; ret;"""
    run_tensor(
        tensor_map, 64, tensor_body(3, "{0, 4, 2}") + store, out, ptx.TensorMap(back, (4, 2, 2))
    )
    assert back[2, 4].tolist() == x[2, 4].tolist() and back.count_nonzero() == 4


def test_a_tile_is_added_to_a_tensor() -> None:
    x, total = torch.randn(4, 8), torch.ones(4, 8)
    out = torch.zeros(1)
    add = """cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group
    [%w6, {0, 2}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; ret;"""
    run_tensor(ptx.TensorMap(x, (8, 2)), 64, tensor_body(2, "{0, 0}") + add, out,
               ptx.TensorMap(total, (8, 2)))  # fmt: skip
    assert torch.equal(total[2:], 1 + x[:2]) and total[:2].eq(1).all()


def test_what_a_tensor_map_refuses() -> None:
    x = torch.zeros(8, 36)
    for options, rule in (
        ({"box": (3, 8)}, "rows are multiples of 16 bytes"),
        ({"box": (64, 8), "swizzle": 128}, "no wider than its swizzle"),
        ({"box": (4, 300)}, "1 to 256"),
        ({"box": (4,)}, "strides to fit"),
    ):
        with pytest.raises(ValueError, match=re.escape(rule)):
            ptx.TensorMap(x, **options)
    with pytest.raises(ValueError, match="strides that are multiples"):
        ptx.TensorMap(torch.zeros(8, 37), (4, 8))


def test_ctas_that_wait_for_each_other_run_together() -> None:
    """Each adds itself to a count and polls until all have: more than may be resident at first."""
    text = module(
        ["count"],
        """.reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %w<9>; ld.param.u64 %w0, [count];
        mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0; @%p0 red.global.add.u32 [%w0], 1;
        poll: ld.acquire.gpu.global.b32 %r1, [%w0]; setp.ge.u32 %p1, %r1, 3; @%p1 bra done;
        nanosleep.u32 20; bra poll; done: ret;""",
    )
    count = torch.zeros(1, dtype=torch.int32)
    ptx.Kernel(text).launch((3,), 32, [count], residents=1)
    assert count.item() == 3


def test_a_register_of_a_product_in_flight_may_not_be_used() -> None:
    registers = ", ".join(f"%r{i}" for i in range(10, 14))
    product = f"""mov.u32 %r1, memory; shr.u32 %r2, %r1, 4; cvt.u64.u32 %w0, %r2;
    or.b64 %w0, %w0, 0x4000000000010000; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{registers}}}, %w0, %w0, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;"""
    wait = "wgmma.wait_group.sync.aligned 0;"
    launch(product + wait + "add.f32 %r10, %r10, %r10;", threads=128, shared=8192)
    with fault("a register is used that a wgmma still in flight"):
        launch(product + "add.f32 %r10, %r10, %r10;" + wait, threads=128, shared=8192)
    with fault("exits with a wgmma in flight"):
        launch(product, threads=128, shared=8192)
