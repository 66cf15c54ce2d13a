import time

import pytest
import torch

from benchmarks.common import measure
from benchmarks.common.measure import Timing

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


def test_a_timing_has_the_middle_half_of_its_samples():
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (timing.fastest, timing.lower, timing.median, timing.upper) == (1, 2, 3, 4)
    assert (timing.slowest, timing.samples) == (100, 5)
    assert Timing.of([2.0]).lower == Timing.of([2.0]).upper == 2


def test_inputs_in_turn_are_more_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(measure, "last_level_cache", lambda: 8 * MIB)
    assert measure.input_sets(5 * MIB, CPU) == 4
    assert measure.input_sets(16 * MIB, CPU) == 1
    assert measure.input_sets(1, CPU) == measure.MOST_SETS
    assert measure.input_sets(1, torch.device("cuda")) == 1, "its cache is flushed"


def test_the_cache_is_what_the_system_says(monkeypatch, tmp_path):
    file = tmp_path / "size"
    monkeypatch.setattr(measure, "_LAST_LEVEL_CACHE", file)
    assert measure.last_level_cache() == measure.USUAL_CACHE
    file.write_text("260096K\n")
    assert measure.last_level_cache() == 254 * MIB


def test_runs_are_called_in_turn():
    called = []
    run = measure.rotated([lambda n=n: called.append(n) for n in range(3)])
    for _ in range(4):
        run()
    assert called == [0, 1, 2, 0]


def test_calls_of_the_backward_pass_count():
    x = torch.ones(3, requires_grad=True)
    forward = measure.count_calls(lambda: x * 2, CPU)
    both = measure.count_calls(lambda: torch.autograd.grad(x * 2, x, torch.ones(3)), CPU)
    assert forward == 1 and both == 3, "the product, the ones, the gradient's product"
