"""Shuffles, votes, matrices and lanes that part and meet."""

import numpy as np
import ptx
import pytest
from ptx.snippet import evaluate

LANES = np.arange(32)


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source", "inside"),
    [
        ("bfly", 5, 31, LANES ^ 5, LANES >= 0),
        ("idx", 7, 31, LANES * 0 + 7, LANES >= 0),
        ("up", 3, 0, np.where(LANES >= 3, LANES - 3, LANES), LANES >= 3),
        ("down", 3, 31, np.where(LANES < 29, LANES + 3, LANES), LANES < 29),
        # Segments of eight lanes: the mask of the segment is 0x18, shifted by eight bits.
        ("down", 2, 0x181F, np.where(LANES % 8 < 6, LANES + 2, LANES), LANES % 8 < 6),
        ("up", 2, 0x1800, np.where(LANES % 8 >= 2, LANES - 2, LANES), LANES % 8 >= 2),
        ("idx", 9, 0x181F, LANES // 8 * 8 + 1, LANES >= 0),
        ("bfly", 4, 0x1803, LANES, LANES < 0),
    ],
)
def test_shuffles(mode: str, by: int, clamp: int, source: np.ndarray, inside: np.ndarray) -> None:
    if (mode, clamp) == ("bfly", 0x1803):  # lanes beyond the clamp keep their own
        source = np.where((LANES ^ 4) % 8 <= 3, LANES ^ 4, LANES)
        inside = (LANES ^ 4) % 8 <= 3
    code = f"""mul.lo.u32 y, %t, 3; shfl.sync.{mode}.b32 y|%p0, y, {by}, {clamp}, -1;
    selp.u32 z, 1, 0, %p0;"""
    found = evaluate(code, {"y": "u32", "z": "u32"})
    assert found["y"].tolist() == (3 * source).tolist()
    assert found["z"].tolist() == inside.tolist()


def test_a_shuffle_out_of_a_lane_that_is_not_there_gives_no_number() -> None:
    code = """mov.u32 y, 5; setp.lt.u32 %p0, %t, 16;
    @%p0 shfl.sync.idx.b32 y, %t, 20, 31, 0xffff;"""
    assert evaluate(code, {"y": "u32"})["y"].tolist() == [2**32 - 1] * 16 + [5] * 16


def test_votes() -> None:
    code = """setp.lt.u32 %p0, %t, 5; vote.sync.ballot.b32 a, %p0, -1;
    vote.sync.all.pred %p1, %p0, -1; vote.sync.any.pred %p2, !%p0, -1;
    vote.sync.uni.pred %p3, %p0, -1; activemask.b32 e;
    selp.u32 b, 1, 0, %p1; selp.u32 c, 1, 0, %p2; selp.u32 d, 1, 0, %p3;
    redux.sync.add.s32 f, %t, -1; redux.sync.max.u32 g, %t, -1;
    shr.u32 h, %t, 2; match.any.sync.b32 h, h, -1;"""
    found = evaluate(code, dict.fromkeys("abcdefgh", "u32"))
    values = [int(x[6]) for x in found.values()]
    assert values == [31, 0, 1, 0, 2**32 - 1, 496, 31, 0xF0]


def test_the_first_lane_of_the_mask_is_elected() -> None:
    code = "mov.u32 y, 0; setp.ge.u32 %p1, %t, 4; @!%p1 bra end; "
    code += "elect.sync x|%p0, 0xfffffff0; @%p0 mov.u32 y, 1; end:"
    found = evaluate(code, {"x": "u32", "y": "u32"})
    assert found["y"].tolist() == [0] * 4 + [1] + [0] * 27 and found["x"][10] == 4


def test_lanes_part_and_meet_again() -> None:
    """Odd lanes loop as often as their number says; the vote after it has all of them."""
    code = """mov.u32 y, 0; and.b32 %r0, %t, 1; setp.eq.u32 %p0, %r0, 0; @%p0 bra even;
    again: add.u32 y, y, 1; setp.lt.u32 %p1, y, %t; @%p1 bra again; bra.uni join;
    even: add.u32 y, %t, 100;
    join: activemask.b32 z;"""
    found = evaluate(code, {"y": "u32", "z": "u32"})
    assert found["y"].tolist() == [t if t % 2 else t + 100 for t in range(32)]
    assert set(found["z"]) == {2**32 - 1}


def test_lanes_that_have_returned_are_not_waited_for() -> None:
    code = """mov.u32 y, 3; setp.ge.u32 %p0, %t, 30; @%p0 ret;
    redux.sync.add.u32 y, %t, -1;"""
    assert evaluate(code, {"y": "u32"})["y"].tolist() == [sum(range(30))] * 30 + [0, 0]


def test_a_lane_waits_for_another_of_its_warp() -> None:
    """Lane 0 polls what lane 31 does after it in the program: both must get their turns."""
    code = """mov.u32 %r1, memory; mov.u32 y, 0;
    setp.eq.u32 %p0, %t, 0; @%p0 mbarrier.init.shared::cta.b64 [%r1], 1; bar.warp.sync -1;
    @!%p0 bra other;
    poll: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra poll;
    mov.u32 y, 7; bra.uni done;
    other: setp.eq.u32 %p2, %t, 31; @%p2 mbarrier.arrive.shared::cta.b64 _, [%r1];
    done: bar.warp.sync -1;"""
    assert evaluate(code, {"y": "u32"}, shared=16)["y"].tolist() == [7] + [0] * 31


def test_a_branch_by_a_table() -> None:
    code = """and.b32 %r0, %t, 3; brx.idx %r0, table;
    table: .branchtargets zero, one, two, zero;
    zero: mov.u32 y, 10; bra end;
    one: mov.u32 y, 11; bra end;
    two: mov.u32 y, 12;
    end: add.u32 y, y, %t;"""
    expected = [t + [10, 11, 12, 10][t % 4] for t in range(32)]
    assert evaluate(code, {"y": "u32"})["y"].tolist() == expected


def test_lanes_that_miss_a_vote_are_named() -> None:
    code = """setp.lt.u32 %p0, %t, 3; @%p0 bra away; vote.sync.any.pred %p1, 1, -1;
    bra.uni end; away: bar.sync 1, 64; end: mov.u32 y, 0;"""
    with pytest.raises(ptx.core().Fault, match=r"(?s)deadlock.*lanes 0,1,2"):
        evaluate(code, {"y": "u32"})


@pytest.mark.parametrize(
    "code",
    ["frobnicate.b32 y, %t;", "add.u128 y, %t, %t;", "add.wrong.u32 y, %t, %t;",
     "call (y), thing, (%t);", "mov.u32 y, %unheard;"],
)  # fmt: skip
def test_an_unknown_instruction_is_named(code: str) -> None:
    name = "%unheard" if "%unheard" in code else code.rstrip(";")
    with pytest.raises(ptx.core().Fault, match="not implemented") as error:
        evaluate(code, {"y": "u32"})
    assert name in str(error.value)


def test_barriers_of_some_warps_with_a_thread_count() -> None:
    """Two warps meet at barrier 1; a third arrives there without waiting, and is read by them."""
    code = """shr.u32 %r0, %t, 5; mov.u32 %r1, memory; mov.u32 y, 0;
    setp.eq.u32 %p0, %r0, 2; setp.eq.u32 %p1, %t, 64; setp.eq.u32 %p2, %r0, 3; @%p2 bra end;
    @!%p0 bra wait;
    @%p1 st.shared.u32 [%r1], 77; bar.arrive 1, 96; bra end;
    wait: bar.sync 1, 96; ld.shared.u32 y, [%r1];
    end: mov.u32 %r2, 0;"""
    for seed in range(8):
        found = evaluate(code, {"y": "u32"}, threads=128, shared=16, seed=seed)["y"]
        assert found.tolist() == [77] * 64 + [0] * 64


def test_barriers_count_and_vote() -> None:
    code = """setp.lt.u32 %p0, %t, 40; bar.red.popc.u32 y, 0, %p0;
    bar.red.or.pred %p1, 0, %p0; bar.red.and.pred %p2, 0, %p0;
    selp.u32 z, 1, 0, %p1; selp.u32 v, 1, 0, %p2;"""
    found = evaluate(code, {"y": "u32", "z": "u32", "v": "u32"}, threads=64)
    assert [set(x.tolist()) for x in found.values()] == [{40}, {1}, {0}]


def test_a_barrier_that_not_all_reach_is_a_deadlock() -> None:
    code = "setp.lt.u32 %p0, %t, 32; @%p0 bar.sync 2, 64; mov.u32 y, 0;"
    with pytest.raises(ptx.core().Fault, match=r"deadlock:\s+CTA 0,0,0 warp 0: @%p0 bar.sync 2"):
        evaluate(code, {"y": "u32"}, threads=64)


def test_fences_and_hints_do_nothing_and_are_counted() -> None:
    lines = [
        "fence.acq_rel.gpu;",
        "membar.cta;",
        "griddepcontrol.wait;",
        "fence.proxy.async;",
        "griddepcontrol.launch_dependents;",
        "setmaxnreg.dec.sync.aligned.u32 40;",
    ]
    kernel = ptx.Kernel(ptx.snippet.module([], "\n".join([*lines, "membar.cta; ret;"])))
    kernel.launch((3,), 64, [])
    assert kernel.counts()["membar.cta"] == 12
    assert all(kernel.counts()[line[:-1].split(" ")[0]] % 6 == 0 for line in lines)
