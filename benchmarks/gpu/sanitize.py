"""The GPU's tests under compute-sanitizer: accesses outside of memory, races in shared memory.

    python -m benchmarks.gpu.sanitize --append sanitize.jsonl [--tools memcheck racecheck]

A checked kernel takes some tens of times as long, so of every parametrised test one case is run for
each implementation. The tests are shared among processes, each with a checker of its own. Without
torch's cache of freed memory what lies past a tensor's end is nobody's. The exit status is 1 if the
checker found anything or a test failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.journal import Journal, started
from benchmarks.gpu.gpu_stages import PYTEST

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")
FOUND = 9
LOG_LINES = 12


def command(tool: str, shard: str, folders: Sequence[str]) -> list[str]:
    """The checker around one shard of the tests."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    tests = ["--tb=line", "-m", "gpu", "--one-of-each", "--shard", shard, "--timeout=0", *folders]
    return [*checker, "--print-limit", "5", sys.executable, "-c", PYTEST, *tests]


def outcome(status: int, text: str) -> dict[str, Any]:
    """What a shard's output says: errors of the checker, tests, and the lines that tell."""
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    tests = {n: int(c) for c, n in re.findall(r"(\d+) (passed|failed|skipped|error)\b", text)}
    telling = [x for x in text.splitlines() if x.startswith(("=========", "FAILED"))]
    return {
        "status": status,
        "errors": int((errors or hazards or ["-1"])[-1]),
        "tests": tests,
        "log": telling[:LOG_LINES] if status else [],
    }


def run(
    tool: str, shards: int, folders: Sequence[str], deadline: float, logs: Path
) -> list[dict[str, Any]]:
    """The shards side by side; one that the deadline cuts short has the status None."""
    names = [f"{i}/{shards}" for i in range(shards)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    processes, files = [], []
    for name in names:
        file = (logs / f"{tool}-{name.replace('/', '-of-')}.log").open("w+", encoding="utf-8")
        processes.append(
            subprocess.Popen(
                command(tool, name, folders),
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        )
        files.append(file)
    rows = []
    for name, process, file in zip(names, processes, files, strict=True):
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = -1
        file.seek(0)
        rows.append({"tool": tool, "shard": name, **outcome(status, file.read())})
        file.close()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--tests", nargs="+", default=["tests/ops"], metavar="FOLDER")
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--minutes", type=float, default=5.0, help="for all tools together")
    parser.add_argument("--append", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the PATH", file=sys.stderr)
        return 2
    journal, done = Journal(args.append), started(args.append)
    begun, failed = time.monotonic(), False
    for number, tool in enumerate(args.tools, start=1):
        item = {"tool": tool}
        if item in done:
            continue
        journal.add("start", item=item)
        deadline = begun + 60 * args.minutes * number / len(args.tools)
        for row in run(tool, args.processes, args.tests, deadline, args.append.parent):
            journal.add("row", item=item, **row)
            print(row["tool"], row["shard"], row["errors"], row["tests"], *row["log"], sep="\n  ")
            failed = failed or row["status"] != 0
        journal.add("end", item=item)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
