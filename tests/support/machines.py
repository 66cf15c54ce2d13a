"""Runs the tests that compute as other machines would, one after another: `make test-machines`.

    python tests/support/machines.py [pytest's arguments]

A line for each machine with pytest's counts; what failed and the rest of the output is under
build/machines. The exit status is 1 if any run failed. Vendors' libraries are limited to older
instruction sets where the processor has newer ones; where it has not, that run repeats another.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "build" / "machines"
NUMERICS = [f"tests/{name}" for name in ("ops", "models", "training", "trainers", "benchmarks")]

# Variables of the environment, and options of pytest.
MACHINES: dict[str, tuple[dict[str, str], list[str]]] = {
    "this one": ({}, []),
    "oneDNN with AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, []),
    "oneDNN with AVX512": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, []),
    "oneDNN with AVX512 and bfloat16": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, []),
    "MKL and ATen with AVX2": (
        {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        [],
    ),
    "products in another order": ({}, ["--products=other"]),
    "C locale": ({"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}, []),
}


def main(arguments: list[str]) -> int:
    LOGS.mkdir(parents=True, exist_ok=True)
    chosen = arguments if any(a.startswith("tests") for a in arguments) else NUMERICS + arguments
    pytest = Path(sys.executable).with_name("pytest")
    failed = 0
    for name, (variables, options) in MACHINES.items():
        log = LOGS / f"{name.replace(' ', '-')}.log"
        begin = time.monotonic()
        with log.open("w") as file:
            done = subprocess.run(
                [pytest, "-p", "no:cacheprovider", *options, *chosen],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        minutes = (time.monotonic() - begin) / 60
        lines = log.read_text(errors="replace").rstrip().splitlines()
        print(f"{name}: {lines[-1] if lines else 'no output'} ({minutes:.1f} min)", flush=True)
        failed += done.returncode != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
