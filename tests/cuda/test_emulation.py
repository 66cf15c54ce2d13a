"""The host emulation plays CUDA's barriers and shuffles, and finds kernels that misuse them."""

import math
import random
from pathlib import Path

import pytest
from emulated_cuda import build


@pytest.fixture(scope="module")
def kernels():
    return build("broken_kernels", [Path(__file__).parent / "broken_kernels.cpp"])


def test_block_reduction(kernels):
    x = [float(random.Random(0).randrange(100)) for _ in range(192)]
    assert kernels.block_sums(x) == [sum(x[:96])] * 96 + [sum(x[96:])] * 96


def test_shuffles(kernels):
    y = kernels.shuffles()
    lanes = range(32)
    assert y[0:32] == [3.0] * 32
    assert y[32:64] == [i - 2 if i >= 2 else i for i in lanes]
    assert y[64:96] == [i + 2 if i < 30 else i for i in lanes]
    assert y[96:128] == [i ^ 1 for i in lanes]
    assert y[128:160] == [2**1 + 2**4] * 32
    assert y[160:176] == [15 - i for i in range(16)]
    assert y[176:] == [-1.0] * 16  # the lanes that are not in the mask went on


def test_a_missing_barrier_shows(kernels):
    x = [float(i) for i in range(64)]
    expected = [*x[1:], x[0]]
    assert kernels.neighbours(x, True) == expected
    wrong = kernels.neighbours(x, False)
    early = [i for i in range(64) if math.isnan(wrong[i])]
    assert early and all(wrong[i] == expected[i] for i in range(64) if i not in early)


def test_shared_memory_starts_unknown_in_every_block(kernels):
    assert all(map(math.isnan, kernels.unwritten([1.0])))


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        ("early_exit", r"wait in vain: thread 0 is at __syncthreads.*thread 5 has exited"),
        ("two_barriers", r"wait in vain: thread 0 is at __syncthreads in.*thread 32 is at"),
        ("exited_lane", r"waits for an exited lane: .*, thread 7 has exited"),
        ("outside_mask", r"reads a lane outside its mask"),
        ("not_in_mask", r"a lane is not in its own mask"),
    ],
)
def test_threads_that_wait_in_vain_are_an_error(kernels, kernel, problem):
    with pytest.raises(RuntimeError, match=f"kernel, block 0: .*{problem}"):
        getattr(kernels, kernel)()
