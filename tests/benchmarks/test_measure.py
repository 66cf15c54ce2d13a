import time

import pytest
import torch

from benchmarks.common import measure

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_starts_again_after_a_reset():
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    del block
    measure.release_free_memory()
    measure.reset_peak()
    before = measure.peak_resident_bytes()
    block = torch.ones(32 * MIB, dtype=torch.uint8)
    assert before + 28 * MIB < measure.peak_resident_bytes() < before + 60 * MIB
    assert measure.resident_bytes() <= measure.peak_resident_bytes()
    del block


@pytest.mark.parametrize("mib", [0, 8, 64])
def test_extra_memory_is_what_a_call_takes(mib):
    def run():
        return torch.ones(mib * MIB // 4).sum()

    run()
    assert measure.extra_memory(run, CPU) / MIB == pytest.approx(mib, abs=3)


def test_timing_alternates_and_tells_slow_from_fast():
    order = []

    def sleeper(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    timings = measure.time_alternating(
        {"fast": sleeper("fast", 0.001), "slow": sleeper("slow", 0.02)},
        CPU,
        samples=3,
        sample_seconds=0.001,
    )
    assert 0.001 <= timings["fast"].fastest <= timings["fast"].median <= timings["fast"].slowest
    assert timings["slow"].fastest >= 0.02
    assert order[-4:] == ["fast", "slow"] * 2


def test_matmuls_of_a_linear():
    forward, backward = measure.linear_matmuls(3, 5, 7)
    assert forward.flops == backward.flops == 2 * 3 * 5 * 7
    for matmul, columns in ((forward, 5), (backward, 7)):
        left, right, out = measure._operands(matmul, torch.float32, CPU)
        assert (left @ right).shape == out.shape == (3, columns)
