"""The check of compiled kernels passes on what is in the tree, and finds planted faults."""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_of_the_tree_pass(tmp_path: Path) -> None:
    page = tmp_path / "registers.md"
    done = run(ROOT / "kernels/check.py", "--quick", "--page", page)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    row = next(x for x in done.stdout.splitlines() if x.startswith("_glu_fwd_kernel"))
    assert row.split()[-1] == "16", "rows of 16 aligned bytes are loaded 16 bytes at a time"
    made, kept = page.read_text(), (ROOT / "kernels/notes/registers.md").read_text()
    if f"Triton {version('triton')}:" in kept:  # another version compiles otherwise
        assert made == kept, "the command in the page makes it anew"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    done = run(ROOT / "tests/support/faulty_kernels.py")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_kernel_that_fits_passes(outcomes: dict[str, Any]) -> None:
    assert outcomes["fits"]["status"] == 0, outcomes["fits"]["output"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("spill", "_scaled_kernel, no table, capability 90: "),
        ("spill", "bytes of stack: registers are spilled"),
        ("shared", "131072 bytes of shared memory, the limit is 101376"),
        ("no matrix", "no matrix instructions (wgmma.mma_async or mma.sync) [glu_fwd("),
        ("no wgmma", "no matrix instructions (wgmma.mma_async) [product(bfloat16[16, 4096])]"),
        ("dead line", "glu_fwd, capability *, dtype *, size <= 96: no case in check_cases.py"),
        ("uncompiled", "lora_engine.backends.triton.glu._glu_bwd_kernel: no case compiled it"),
        ("grid", "grid dimension 1 is 65536, the limit is 65535"),
        ("raises", "product(bfloat16[300, 4096]), capability 90: ValueError: product: no launch"),
    ],
)
def test_a_fault_is_found(outcomes: dict[str, Any], fault: str, message: str) -> None:
    assert outcomes[fault]["status"] == 1
    failures = [x for x in outcomes[fault]["output"].splitlines() if x.startswith("FAILED: ")]
    assert any(message in line for line in failures), failures


@pytest.mark.slow
def test_only_the_faulty_line_is_reported(outcomes: dict[str, Any]) -> None:
    for fault in ("spill", "shared", "no matrix", "no wgmma", "grid"):
        assert outcomes[fault]["output"].count("FAILED") == 1, outcomes[fault]["output"]


@pytest.mark.slow
def test_what_is_reached_and_compiled_is_not_reported(outcomes: dict[str, Any]) -> None:
    assert outcomes["dead line"]["output"].count("launch_table.json: glu_fwd,") == 1
    assert "_glu_fwd_kernel: no case compiled it" not in outcomes["uncompiled"]["output"]
