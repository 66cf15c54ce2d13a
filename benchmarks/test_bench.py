"""The registry under pytest-benchmark.

    pytest benchmarks --benchmark-only                 # all of it, half an hour and more
    pytest benchmarks --benchmark-only -m "not slow"   # kernels
    pytest benchmarks --benchmark-only -m slow         # whole steps, a process for each contender

The cases, the check before the time and the inputs in turn are those of `lora-engine bench`, which
also takes the contenders in turn and measures the ceiling of each case beside it.
"""

import pytest
import torch

from benchmarks.common import jobs, measure
from benchmarks.common.job_rows import rows_of
from benchmarks.common.registry import CASES, SIZES
from benchmarks.common.verify import verify
from benchmarks.kernels import run
from benchmarks.kernels.plans import Item

TINY = SIZES["tiny"]
CPU = torch.device("cpu")


def contenders_of(case: str) -> list[str]:
    problem = CASES[case](TINY, torch.float32, CPU)
    others = dict(run._others(Item(case, "tiny", "float32"), problem, CPU))
    return ["ours", "pytorch", *others]


PAIRS = [(case, name) for case in CASES for name in contenders_of(case)]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=[f"{c}-{n}" for c, n in PAIRS])
def test_kernel(case, name, benchmark, request):
    size, dtype, device = (
        request.config.getoption(f"--bench-{x}") for x in ("size", "dtype", "device")
    )
    benchmark.group = f"{case}, {size}, {dtype}"
    where = torch.device(device)
    torch.manual_seed(0)
    item = Item(case, size, dtype)
    problem = CASES[case](SIZES[size], getattr(torch, dtype), where)
    verified = run._verified_problem(item, problem, where, notes=[])
    contender = run.contenders(item, verified, where)[name]
    try:
        verify(verified, contender.function, in_place=contender.in_place)
    except Exception as error:
        if name in ("ours", "pytorch"):
            raise
        pytest.skip(f"{name} is not right: {error}")
    sets = run.input_sets(item, problem, [name], where)
    backward = problem.both is not None
    once = measure.rotated([run._run(p, found[name], backward=backward) for p, found in sets])

    def timed():
        once()
        if where.type == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", jobs.MODULES)
def test_step(name, benchmark, request, tmp_path):
    job = jobs.job_of(name)
    words = {"rounds": "1", "model": request.config.getoption("--bench-model")}
    options, names = jobs.options_of(job, words)
    measured = benchmark.pedantic(
        lambda: jobs.measure_job(job, options, names, tmp_path, print), rounds=1
    )
    assert not measured.failures
    for row in rows_of(measured):
        where = f"{row['implementation']} {row.get('x', '')}".strip()
        benchmark.extra_info[where] = {key: row[key] for key in ("rate", "unit", "peak_bytes")}
