"""One command on a machine with a GPU: build, test, measure, and write down what was seen.

    make gpu-check OUT=results [MINUTES=8] [PYTHON=python3]
    python3 -m benchmarks.gpu.gpu_check --out results --minutes 8

Run it with a Python that has torch, pytest and what builds the extension (setuptools, pybind11).
Nothing is fetched and nothing is written into that Python's packages. Every stage's outcome is
recorded and no failure keeps a later stage from running; results are on the disk as they come, so
a time-out loses nothing. Without a GPU the same stages run on small sizes.

OUT gets environment.json, check.log, tests.xml, results.jsonl and report.md. The exit status is 1
if the build, a test or a comparison with the reference failed or a stage was cut short.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import journal
from benchmarks.gpu import gpu_report

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build" / "gpu-check"
# Of the time, what the tests may take at most, and what is kept for the report.
TESTS_SHARE = 0.5
REPORT_SECONDS = 5
GRACE_SECONDS = 10
DEVICE_LOST = 3

NVIDIA_SMI = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.limit", "memory.total", "temperature.gpu",
)  # fmt: skip
# Runs in PYTHON; what fails to import is said, not hidden.
FACTS = """
import importlib, json, platform, site, sys
facts = {"python": platform.python_version(), "executable": sys.executable}
for name in ("torch", "triton", "numpy", "transformers", "liger_kernel", "pybind11", "setuptools"):
    try:
        module = importlib.import_module(name)
        facts[name] = str(getattr(module, "__version__", "present"))
    except Exception as error:
        facts[name] = f"absent: {error}"
try:
    import torch
    facts["cuda"], facts["cuda available"] = torch.version.cuda, torch.cuda.is_available()
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        major, minor = torch.cuda.get_device_capability()
        facts["capability"] = 10 * major + minor
except Exception as error:
    facts["cuda available"] = False
paths = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
print(json.dumps({"facts": facts, "site": paths}))
"""
# As the command `pytest`: the working directory is not on the import path.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"
# The folders that need no more than torch, triton and pytest; a machine that cannot fetch packages
# may lack what the training loop needs, and one module that is missing stops all of pytest.
GPU_TESTS = ("tests/ops", "tests/kernels", "tests/cuda", "tests/benchmarks")
DRY_TESTS = ("tests/ops/test_glu.py", "-k", "oracle and 63")


@dataclass(frozen=True)
class Stage:
    """What came of a part of the check. outcome: "passed", or what went wrong."""

    name: str
    outcome: str
    seconds: float


class Check:
    """The stages, one after the other, and what they left."""

    def __init__(self, out: Path, minutes: float, python: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.python, self.begun = out.resolve(), python, time.monotonic()
        self.seconds = 60 * minutes
        self.stages: list[Stage] = []
        self.gpu = False

    def left(self) -> float:
        """Seconds until the time is over."""
        return self.begun + self.seconds - time.monotonic()

    def environment(self) -> list[str]:
        """Writes environment.json; the folders of PYTHON's packages."""
        begun = time.monotonic()
        found: dict[str, Any] = {"facts": {}, "site": []}
        try:
            command = [self.python, "-c", FACTS]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found, outcome = json.loads(done.stdout.splitlines()[-1]), "passed"
        except subprocess.CalledProcessError as error:
            outcome = f"exit status {error.returncode}: {' '.join(error.stderr.split())[-300:]}"
        except (OSError, ValueError, IndexError) as error:
            outcome = f"no facts from {self.python}: {error}"
        self.gpu = bool(found["facts"].get("cuda available"))
        self.write_environment({"versions": found["facts"], "nvidia-smi": {"before": nvidia_smi()}})
        self.stages.append(Stage("environment", outcome, time.monotonic() - begun))
        return list(found["site"])

    def write_environment(self, facts: dict[str, Any]) -> None:
        path = self.out / "environment.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        smi = {**old.get("nvidia-smi", {}), **facts.pop("nvidia-smi", {})}
        path.write_text(json.dumps({**old, **facts, "nvidia-smi": smi}, indent=1) + "\n")

    def build(self, site: Sequence[str]) -> str:
        """Installs this tree into an environment of its own that sees PYTHON's packages.

        Its interpreter. An editable installation is what the tests run in elsewhere; it needs an
        environment that may be written to.
        """
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        interpreter = str(ENVIRONMENT / "bin" / "python")
        begun = time.monotonic()
        made = self.run([self.python, "-m", "venv", "--without-pip", str(ENVIRONMENT)])
        if made == "passed":
            for folder in ENVIRONMENT.glob("lib/python*/site-packages"):
                lines = [f"import site; site.addsitedir({path!r})" for path in site]
                (folder / "machine.pth").write_text("\n".join(lines) + "\n")
            install = [self.python, "-m", "pip", "--python", interpreter, "install", "--no-deps"]
            made = self.run([*install, "--no-build-isolation", "--no-index", "-e", str(ROOT)])
        self.stages.append(Stage("build", made, time.monotonic() - begun))
        return interpreter

    def tests(self, interpreter: str, folders: Sequence[str]) -> None:
        present = [folder for folder in folders if (ROOT / folder).exists()]
        selection = ("-m", "gpu", *present) if self.gpu else DRY_TESTS
        options = ("-v", "--tb=short", "--continue-on-collection-errors")
        xml = f"--junitxml={self.out / 'tests.xml'}"
        command = [interpreter, "-c", PYTEST, *options, xml, *selection]
        self.stage("tests", command, TESTS_SHARE * self.left())

    def benchmarks(self, interpreter: str) -> None:
        """Again after an error that took the GPU from the process, with what is not begun yet."""
        results = self.out / "results.jsonl"
        begun, outcome = time.monotonic(), "the time was over"
        while (limit := self.left() - REPORT_SECONDS) > 0:
            before = len(journal.started(results))
            device = ["--device", "cuda"] if self.gpu else ["--device", "cpu", "--samples", "1"]
            command = [interpreter, "-m", "benchmarks.kernels.run", "--plan", *device]
            minutes = f"{limit / 60:.3f}"
            outcome = self.run([*command, "--minutes", minutes, "--append", str(results)], limit)
            lost = outcome == f"exit status {DEVICE_LOST}" or outcome.startswith("signal")
            if not lost or len(journal.started(results)) == before:
                break
        if outcome == "passed" and any(x["event"] == "failure" for x in journal.read(results)):
            outcome = "exit status 1"
        self.stages.append(Stage("benchmarks", outcome, time.monotonic() - begun))

    def stage(self, name: str, command: Sequence[str], limit: float) -> None:
        begun = time.monotonic()
        outcome = self.run(command, limit)
        self.stages.append(Stage(name, outcome, time.monotonic() - begun))

    def run(self, command: Sequence[str], limit: float | None = None) -> str:
        """Runs a command, its output to check.log; "passed" or what went wrong.

        At the limit it is interrupted, so that pytest still writes its results, and killed if that
        does not end it.
        """
        limit = self.left() if limit is None else limit
        with (self.out / "check.log").open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            if limit <= 0:
                log.write("not begun: the time was over\n")
                return "not begun, the time was over"
            try:
                process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{error}\n")
                return f"not begun, {error}"
            cut_short = False
            for seconds, stop in ((limit, signal.SIGINT), (GRACE_SECONDS, signal.SIGKILL)):
                try:
                    process.wait(seconds)
                    break
                except subprocess.TimeoutExpired:
                    cut_short = True
                    os.killpg(process.pid, stop)
            status = process.wait()
        if cut_short:
            return f"cut short after {limit:.0f} s"
        if status < 0:
            return f"signal {-status}"
        return "passed" if status == 0 else f"exit status {status}"


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return {}
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        return {"error": (done.stderr or done.stdout).strip()}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(NVIDIA_SMI, values, strict=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--python", default=sys.executable, help="default: the one that runs this")
    parser.add_argument(
        "--tests", nargs="+", default=GPU_TESTS, metavar="FOLDER", help="where the GPU's tests are"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check = Check(args.out, args.minutes, args.python)
    for name in ("environment.json", "check.log", "tests.xml", "results.jsonl", "report.md"):
        (check.out / name).unlink(missing_ok=True)
    interpreter = check.build(check.environment())
    check.tests(interpreter, args.tests)
    check.benchmarks(interpreter)
    check.write_environment({"nvidia-smi": {"after": nvidia_smi()}})
    check.write_environment({"stages": [asdict(stage) for stage in check.stages]})
    text = gpu_report.render(check.out)
    (check.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(stage.outcome == "passed" for stage in check.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
