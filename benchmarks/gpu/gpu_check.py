"""One command on a machine with a GPU: build, test, measure, and write down what was seen.

    make gpu-check OUT=results [MINUTES=8] [PYTHON=python3]
    python3 -m benchmarks.gpu.gpu_check --out results --minutes 8

Run it with a Python that has torch, pytest and what builds the extension (setuptools, pybind11).
Nothing is fetched and nothing is written into that Python's packages. Every stage's outcome is
recorded and no failure keeps a later stage from running; results are on the disk as they come, so
a time-out loses nothing, and a second run of the same commit on the same kind of machine goes on
where the first one stopped. Without a GPU the same stages run on small sizes.

OUT gets environment.json, check.log, tests.xml, a file of results for each stage that measures and
report.md. The exit status is 1 if the build, a test or a comparison with the reference failed or a
stage was cut short.
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
from benchmarks.gpu import gpu_report, gpu_stages

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build" / "gpu-check"
RESULTS = ("environment.json", "check.log", "tests.xml", "*.jsonl", "four_bit.*", "report.md")
# Kept for the report, of the time.
REPORT_SECONDS = 5
GRACE_SECONDS = 10
DEVICE_LOST = 3

NVIDIA_SMI = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.limit", "memory.total", "temperature.gpu",
)  # fmt: skip
# Runs in PYTHON; what fails to import is said, not hidden.
FACTS = """
import importlib, json, platform, site
facts = {"python": platform.python_version()}
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


@dataclass(frozen=True)
class Stage:
    """What came of a part of the check. outcome: "passed", or what went wrong."""

    name: str
    outcome: str
    seconds: float


class Check:
    """The stages, one after the other, and what they left."""

    def __init__(self, out: Path, minutes: float, python: str, commit: str | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.python, self.begun = out.resolve(), python, time.monotonic()
        self.commit = commit or git_commit()
        self.seconds = 60 * minutes
        self.stages: list[Stage] = []
        self.passed_before: dict[str, Stage] = {}
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
        before = nvidia_smi()
        identity = {"commit": self.commit, "versions": found["facts"], "GPU": before.get("name")}
        self.continue_or_clear(identity)
        self.write_environment({**identity, "nvidia-smi": {"before": before}})
        self.stages.append(Stage("environment", outcome, time.monotonic() - begun))
        return list(found["site"])

    def continue_or_clear(self, identity: dict[str, Any]) -> None:
        """Results of the same commit on the same kind of machine are gone on with."""
        path = self.out / "environment.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        if self.commit and all(old.get(name) == value for name, value in identity.items()):
            passed = [Stage(**x) for x in old.get("stages", []) if x["outcome"] == "passed"]
            self.passed_before = {stage.name: stage for stage in passed}
            return
        for name in RESULTS:
            for found in self.out.glob(name):
                found.unlink()

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

    def steps(self, interpreter: str, names: Sequence[str], folders: Sequence[str]) -> None:
        """Those of gpu_stages.STEPS with these names that did not pass in a run before."""
        for step in gpu_stages.STEPS:
            if step.name not in names:
                continue
            if step.name in self.passed_before:
                self.stages.append(self.passed_before[step.name])
                continue
            self.step(step, interpreter, folders)

    def step(self, step: gpu_stages.Step, interpreter: str, folders: Sequence[str]) -> None:
        """Again after an error that took the GPU from the process, with what is not begun yet."""
        path = self.out / f"{step.name}.jsonl"
        begun, outcome = time.monotonic(), "not begun, the time was over"
        deadline = begun + step.share * (self.left() - REPORT_SECONDS)
        cores = os.cpu_count() or 1
        while (limit := deadline - time.monotonic()) > 0:
            before = len(journal.started(path))
            where = gpu_stages.Where(interpreter, self.out, self.gpu, cores, limit / 60, folders)
            command = step.command(where)
            if command is None:
                return
            outcome = self.run(command, limit)
            lost = outcome == f"exit status {DEVICE_LOST}" or outcome.startswith("signal")
            if not (step.repeats and lost) or len(journal.started(path)) == before:
                break
        if outcome == "passed" and any(x["event"] == "failure" for x in journal.read(path)):
            outcome = "exit status 1"
        self.stages.append(Stage(step.name, outcome, time.monotonic() - begun))
        # Whatever ends this process, what is known so far is on the disk.
        self.write_environment({"stages": [asdict(stage) for stage in self.stages]})

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


def git_commit() -> str | None:
    """The checked-out commit; None where this is no repository or files differ from it."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain=v2", "--branch", "-uno"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = [x.split()[-1] for x in lines.splitlines() if x.startswith("# branch.oid")]
    changed = any(not x.startswith("#") for x in lines.splitlines())
    return found[0] if found and not changed else None


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
    parser.add_argument("--commit", help="of this tree, where it is no git repository")
    names = [step.name for step in gpu_stages.STEPS]
    parser.add_argument(
        "--stages", nargs="+", choices=names, default=names, help="default: all, in this order"
    )
    parser.add_argument(
        "--tests",
        nargs="+",
        default=gpu_stages.GPU_TESTS,
        metavar="FOLDER",
        help="where the GPU's tests are",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check = Check(args.out, args.minutes, args.python, args.commit)
    interpreter = check.build(check.environment())
    check.steps(interpreter, args.stages, args.tests)
    check.write_environment({"nvidia-smi": {"after": nvidia_smi()}})
    check.write_environment({"stages": [asdict(stage) for stage in check.stages]})
    text = gpu_report.render(check.out)
    (check.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(stage.outcome == "passed" for stage in check.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
