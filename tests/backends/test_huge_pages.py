"""The heap is of huge pages once memory is kept, where Linux gives them on request."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_engine import backends

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.skipif(
        not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="needs huge pages"
    ),
    pytest.mark.skipif(not backends.extension_available(), reason="needs the C++ extension"),
]

HEAP = """
import resource, torch
from lora_engine import backends, ops
CPU = torch.device("cpu")

def heap():
    "Bytes of the heap, and of those the bytes that are to be of huge pages."
    whole = huge = size = 0
    inside = False
    for line in open("/proc/self/smaps"):
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            inside = rest[-1] == "[heap]"
            first, last = (int(end, 16) for end in name.split("-"))
        elif inside and name == "VmFlags:":
            whole += last - first
            huge += (last - first) * ("hg" in rest)
    return whole, huge
"""


def run(code: str) -> list[int]:
    """The numbers that a process prints."""
    done = subprocess.run(
        [sys.executable, "-c", HEAP + code], capture_output=True, text=True, check=True, timeout=120
    )
    return [int(word) for word in done.stdout.split()]


def test_all_of_the_heap_is_when_a_kernel_runs() -> None:
    before, kept, kept_huge, grown, grown_huge = run("""
before = heap()[0]
assert heap()[1] == 0
assert backends.keep_freed_memory(CPU, 64 << 20)
kept = heap()
x = torch.empty(300 << 20, dtype=torch.uint8)
ops.rms_norm(torch.ones(2, 16), torch.ones(16), 1e-6)
print(before, *kept, *heap())
""")
    assert kept >= before + (64 << 20) and kept_huge == kept
    assert grown >= kept + (200 << 20) and grown_huge == grown


def test_nothing_is_set_apart_where_the_address_space_is_limited() -> None:
    before, kept, kept_huge = run("""
resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
before = heap()[0]
assert backends.keep_freed_memory(CPU, 256 << 20)
print(before, *heap())
""")
    assert kept < before + (32 << 20) and kept_huge == kept


def test_without_being_asked_for_it_is_not() -> None:
    whole, huge = run("""
ops.rms_norm(torch.ones(2, 16), torch.ones(16), 1e-6)
print(*heap())
""")
    assert whole > 0 and huge == 0
