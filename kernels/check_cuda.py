"""What the CUDA kernels in csrc/cuda take of each GPU: registers, stack, spills, shared memory.

    python kernels/check_cuda.py

compiles every file for every architecture (nvcc, no GPU) and exits with status 1 if a kernel spills
registers, keeps a stack, takes more static shared memory than the GPU has for a thread block, or
has tensor-core products that wait for each other. A file *_sm90.cu is for 90a alone.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
# Shared memory that a thread block can have, in bytes.
SHARED_LIMIT = {
    "80": 166912,
    "86": 101376,
    "89": 101376,
    "90a": 232448,
    "100": 232448,
    "120": 101376,
}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. Sizes are bytes; `shared` is the static part.

    problem: why it must not ship, or None.
    """

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int
    problem: str | None


class CompileError(Exception):
    """nvcc refused a file."""


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME if that is set, else the one on the PATH, else /usr/local/cuda's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def rows(
    architectures: Sequence[str] = tuple(SHARED_LIMIT),
    sources: Sequence[Path] | None = None,
    flags: Sequence[str] = (),
) -> list[Row]:
    """Every kernel of `sources` (all of csrc/cuda) on each of `architectures`.

    `flags` are further ones for nvcc. Raises CompileError if there is no nvcc or it refuses a file.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("nvcc not found: set CUDA_HOME")
    files = sorted(SOURCES.glob("*.cu")) if sources is None else sources
    jobs = [
        (file, architecture)
        for file in files
        for architecture in architectures
        if architecture == "90a" or not file.name.endswith("_sm90.cu")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        printed = pool.map(lambda job: _compile(nvcc, *job, flags), jobs)
        parts = [parse(text, job[1]) for text, job in zip(printed, jobs, strict=True)]
    return [row for part in parts for row in part]


def parse(printed: str, architecture: str) -> list[Row]:
    """The kernels in what `ptxas -v` printed."""
    rows = []
    serial = set(re.findall(r"\(C75\d\d\) Potential Performance Loss.* function '(\w+)'", printed))
    entries = re.split(r"Compiling entry function '", printed)[1:]
    names = [entry.split("'")[0] for entry in entries]
    for entry, mangled, name in zip(entries, names, _demangled(names), strict=True):
        used = re.search(r"Used (\d+) registers", entry)
        # The first properties are the kernel's; those of functions it calls follow.
        frames = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        if used is None or not frames:
            raise CompileError(f"{name}, {architecture}: ptxas did not say what it uses:\n{entry}")
        shared = re.search(r"(\d+) bytes smem", entry)
        stack = max(int(frame[0]) for frame in frames)
        spilled = sum(int(frame[1]) + int(frame[2]) for frame in frames)
        taken = int(shared[1]) if shared else 0
        problem = _problem(architecture, stack, spilled, taken)
        if mangled in serial:
            problem = problem or "has wgmma instructions that wait for each other"
        rows.append(Row(name, architecture, int(used[1]), stack, spilled, taken, problem))
    return rows


def _problem(architecture: str, stack: int, spilled: int, shared: int) -> str | None:
    if spilled:
        return f"spills {spilled} bytes"
    if stack:
        return f"keeps {stack} bytes on the stack"
    if shared > SHARED_LIMIT[architecture]:
        return f"{shared} bytes of shared memory, the GPU has {SHARED_LIMIT[architecture]}"
    return None


def _compile(nvcc: str, source: Path, architecture: str, flags: Sequence[str]) -> str:
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-cubin", target, "-Xptxas", "-v", *flags]
        command += [str(source), "-o", os.path.join(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{source.name}, {architecture}:\n{done.stderr}")
    return done.stderr


def _demangled(names: list[str]) -> list[str]:
    """`adamw_kernel<true>` for its mangled name; the name as it is without c++filt."""
    if shutil.which("c++filt") is None or not names:
        return names
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [_short(line) for line in done.stdout.splitlines()]


def _short(name: str) -> str:
    """Without the result, the namespaces and the arguments."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|\b\w+::", "", name)
    name = name.split("(", 1)[0] if "<" not in name else re.sub(r">\(.*", ">", name)
    return name.removeprefix("void ").strip()


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    head = ("kernel", "sm", "registers", "stack", "spilled", "shared", "problem")
    lines = [head, *((*(str(v) for v in vars(r).values()),) for r in rows)]
    lines = [(*line[:-1], "" if line[-1] == "None" else line[-1]) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> int:
    try:
        compiled = rows()
    except CompileError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(compiled))
    return 1 if any(row.problem for row in compiled) else 0


if __name__ == "__main__":
    sys.exit(main())
