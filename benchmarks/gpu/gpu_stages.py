"""What gpu_check.py runs once this tree is installed: in order of worth, each within its time.

Every command appends its results to a file of its own as they come and leaves out what that file
has, so that a stage may be cut short, or lose the GPU, and be run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# As the command `pytest`: the working directory is not on the import path.
PYTEST = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"
# The folders that need no more than torch, triton, transformers and pytest; a machine that cannot
# fetch packages may lack what the training loop needs.
GPU_TESTS = (
    "tests/models/whole",
    "tests/ops",
    "tests/kernels",
    "tests/cuda",
    "tests/benchmarks",
    "tests/models/attach",
    "tests/generation",
    "tests/backends/test_devices.py",
    "tests/training/test_training_devices.py",
)
DRY_TESTS = ("tests/ops/test_glu.py", "-k", "oracle and 63")
MOST_TEST_PROCESSES = 14


@dataclass(frozen=True)
class Where:
    """What a stage's command is made from. minutes: what is left for this stage."""

    interpreter: str
    out: Path
    gpu: bool
    cores: int
    minutes: float
    test_folders: Sequence[str] = GPU_TESTS

    def append(self, name: str) -> list[str]:
        return ["--append", str(self.out / f"{name}.jsonl")]


@dataclass(frozen=True)
class Step:
    """A stage.

    share: of the time that is left when it begins, what it may take at most.
    command: None where it cannot run. repeats: run again if it lost the GPU.
    """

    name: str
    share: float
    command: Callable[[Where], list[str] | None]
    repeats: bool = False


def tests(where: Where) -> list[str]:
    selection = ("-m", "gpu", *where.test_folders) if where.gpu else DRY_TESTS
    processes = min(MOST_TEST_PROCESSES, max(1, where.cores - 2)) if where.gpu else 1
    options = ["--tb=short", "--continue-on-collection-errors", "--timeout=120"]
    options += [f"--junitxml={where.out / 'tests.xml'}"]
    if processes > 1:
        options += ["-n", str(processes), "--dist", "worksteal"]
    return [where.interpreter, "-c", PYTEST, "-v", *options, *selection]


def module(name: str, gpu: Sequence[str], dry: Sequence[str] | None, journal: str) -> Callable:
    """`python -m NAME` with the options for a GPU, or those for a machine without one."""

    def command(where: Where) -> list[str] | None:
        options = gpu if where.gpu else dry
        if options is None:
            return None
        minutes = ["--minutes", f"{where.minutes:.3f}"]
        return [where.interpreter, "-m", name, *options, *minutes, *where.append(journal)]

    return command


KERNELS = module(
    "benchmarks.kernels.run",
    ("--plan", "--device", "cuda"),
    ("--plan", "--device", "cpu", "--samples", "1"),
    "kernels",
)
LORA_LINEAR = module(
    "benchmarks.kernels.lora_linear",
    ("--device", "cuda", "--model", "llama-3.1-8b", "--samples", "7"),
    ("--tokens", "8", "--ranks", "4", "--samples", "1"),
    "lora_linear",
)

SANITIZE = module("benchmarks.gpu.sanitize", (), None, "sanitize")

ATTENTION = module("benchmarks.gpu.attention", (), None, "attention")


def four_bit(where: Where) -> list[str] | None:
    if not where.gpu:
        return None
    options = ["--device", "cuda", "--rows", "14336", "--double-quant"]
    return [
        where.interpreter,
        "-m",
        "benchmarks.kernels.four_bit",
        *options,
        "--out",
        str(where.out / "four_bit"),
    ]


def tune(where: Where) -> list[str] | None:
    """The journal alone; `python -m benchmarks.gpu.tune --out OUT --write` makes the table."""
    if not where.gpu:
        return None
    options = ["--out", str(where.out), "--minutes", f"{where.minutes:.3f}"]
    return [where.interpreter, "-m", "benchmarks.gpu.tune", *options, "--jobs", str(where.cores)]


TRAIN_STEP = module(
    "benchmarks.gpu.train_step",
    ("--device", "cuda"),
    ("--device", "cpu", "--jobs", "tiny:lora:tiny", "--contenders", "ours,peft", "--no-host"),
    "train_step",
)

CEILINGS = module(
    "benchmarks.common.ceilings", ("--device", "cuda"), ("--device", "cpu"), "ceilings"
)

STEPS = (
    Step("ceilings", 0.2, CEILINGS, repeats=True),
    Step("tests", 0.6, tests),
    Step("sanitize", 0.4, SANITIZE),
    Step("kernels", 0.6, KERNELS, repeats=True),
    Step("lora_linear", 0.6, LORA_LINEAR, repeats=True),
    Step("attention", 0.4, ATTENTION, repeats=True),
    Step("four_bit", 0.3, four_bit),
    Step("train_step", 0.9, TRAIN_STEP, repeats=True),
    Step("tune", 1.0, tune),
)
