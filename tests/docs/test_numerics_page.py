"""docs/numerics.md names every kernel of ours that adds floating-point numbers in any order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("csrc", "kernels/src")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".cpp", ".h", ".hpp", ".cu", ".cuh", ".py")
]
# PTX, CUDA C++ (a count of whole numbers is no sum that rounds), Triton, C++ and OpenMP.
ATOMICS = re.compile(
    r"\b(?:red|atom)\.[\w.]*add[\w.]*\.b?f\d+"
    r"|\batomicAdd\((?![^;]*, \d+\))"
    r"|\batomic_add\("
    r"|\batomic(?:_ref)?<(?:float|double)"
    r"|\bomp atomic"
)


def test_the_page_names_those_with_floating_point_atomics() -> None:
    found = {str(p.relative_to(ROOT)) for p in SOURCES if ATOMICS.search(p.read_text())}
    page = (ROOT / "docs/numerics.md").read_text()
    assert found
    assert found == set(re.findall(r"`((?:csrc|kernels/src)/[\w/.]+)`\) adds", page))


@pytest.mark.parametrize(
    ("line", "adds"),
    [
        ('asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1};"', True),
        ('asm("atom.global.add.f32 %0, [%1], %2;"', True),
        ("atomicAdd(sums + i, x);", True),
        ("tl.atomic_add(dq_ptr + at, dq)", True),
        ("std::atomic<float> sum;", True),
        ("#pragma omp atomic", True),
        ("next = atomicAdd(a.taken, 1);", False),
        ("tl.atomic_max(last_ptr + ancestor, sequence)", False),
        ("std::atomic<int> waiting;", False),
    ],
)
def test_floating_point_atomics_are_found(line: str, adds: bool) -> None:
    assert bool(ATOMICS.search(line)) == adds
