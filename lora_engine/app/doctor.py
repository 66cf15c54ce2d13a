"""What of lora_engine can run on this machine, what is missing, and how to get it."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

import torch

from lora_engine import backends, machine, openmp
from lora_engine.text import bytes_text

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = Literal["ok", "absent", "problem", "fact"]

DISTRIBUTION = "lora-engine"
FEATURE_USE = {
    "avx2": "the least the C++ kernels need",
    "fma": "the least the C++ kernels need",
    "avx512f": "twice as wide vectors",
    "avx512_bf16": "bfloat16 matrix multiplies at full speed",
    "amx_bf16": "bfloat16 matrix units",
}


@dataclass(frozen=True)
class Fact:
    """One line of the report.

    status: "ok", it is there; "absent", it is not and nothing needs it; "problem", something
    that should work does not; "fact", neither good nor bad. hint: what it is for, or how to
    get it.
    """

    name: str
    value: str
    status: Status = "fact"
    hint: str = ""


@dataclass(frozen=True)
class Section:
    """Facts that belong together."""

    title: str
    facts: tuple[Fact, ...]


def examine() -> list[Section]:
    """Look at this machine; takes about a second and changes nothing."""
    sections = {
        "Python and torch": _torch_facts(),
        "Processor": _processor_facts(),
        "GPU": _gpu_facts(),
        "C++ extension": _extension_facts(),
        "Kernels on this machine": _kernel_facts(),
        "Packages": _package_facts(),
    }
    return [Section(title, tuple(facts)) for title, facts in sections.items()]


def has_problem(sections: Iterable[Section]) -> bool:
    """Whether something that should work here does not."""
    return any(fact.status == "problem" for section in sections for fact in section.facts)


def as_json(sections: Iterable[Section]) -> dict[str, list[dict[str, str]]]:
    """The report as plain values, to be put into an issue or read by a program."""
    return {section.title: [dict(vars(fact)) for fact in section.facts] for section in sections}


def render(sections: Iterable[Section]) -> "RenderableType":
    """The report as rich tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("✓", "green"), "absent": ("-", "dim"), "problem": ("✗", "bold red")}
    parts: list[RenderableType] = []
    for section in sections:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(min_width=18, no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        for fact in section.facts:
            mark, style = marks.get(fact.status, (" ", ""))
            value = Text(fact.value, style="bold red" if fact.status == "problem" else "")
            if fact.hint:
                value.append(f"{'  ' if fact.value else ''}{fact.hint}", style="not bold dim")
            table.add_row(Text(mark, style=style), Text(fact.name), value)
        parts += [Text(section.title, style="bold"), table, Text("")]
    return Group(*parts)


def _torch_facts() -> list[Fact]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    threads = f"{torch.get_num_threads()} threads on {machine.usable_cores()} cores"
    return [
        Fact("Python", f"{platform.python_version()}, {sys.executable}"),
        Fact("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Fact("torch", f"{torch.__version__}, {cuda}", "ok"),
        Fact("torch on the CPU", f"{torch.backends.cpu.get_cpu_capability()}, {threads}"),
        _openmp_fact(),
        _triton_fact(),
    ]


def _openmp_fact() -> Fact:
    """How threads wait: spinning takes a shared machine's time from the threads waited for."""
    backends.extension.loaded()  # settles it where the runtime was loaded before lora_engine
    waiting = openmp.waiting()
    return Fact(
        "OpenMP waits", str(waiting), _status(waiting.policy != "active"), hint=waiting.mend
    )


def _triton_fact() -> Fact:
    version = machine.installed_version("triton")
    if version is None or importlib.util.find_spec("triton") is None:
        return Fact(
            "triton", "not installed", "absent", hint="GPU kernels need it: pip install triton"
        )
    if not machine.gpus():
        return Fact("triton", version, "ok", hint="no GPU here: interpreter and compiler only")
    return Fact("triton", version, "ok")


def _processor_facts() -> list[Fact]:
    features = backends.cpu_features()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [
        Fact("model", machine.processor_name()),
        Fact("memory", bytes_text(machine.memory_bytes())),
        *(
            Fact(name, "yes" if name in features else "no", _status(name in features), hint=use)
            for name, use in FEATURE_USE.items()
            if x86
        ),
    ]


def _gpu_facts() -> list[Fact]:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = next(iter(_output_lines(*query)), "")
    facts = [
        Fact(
            f"GPU {i}",
            f"{gpu.name}, {bytes_text(gpu.memory_bytes)}, "
            f"capability {backends.capability_text(gpu.capability)}",
            "ok",
        )
        for i, gpu in enumerate(machine.gpus())
    ]
    if not facts and driver and torch.version.cuda is None:
        hint = "a driver is here but torch has no CUDA: install a CUDA build, see pytorch.org"
        facts.append(Fact("GPU", "not usable", "problem", hint=hint))
    elif not facts and driver:
        hint = "torch sees no device: is the driver new enough, CUDA_VISIBLE_DEVICES empty?"
        facts.append(Fact("GPU", "not usable", "problem", hint=hint))
    elif not facts:
        facts.append(Fact("GPU", "none", "absent", hint="everything runs on the CPU"))
    if driver:
        facts.append(Fact("driver", driver))
    return [*facts, _nvcc_fact()]


def _nvcc_fact() -> Fact:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        hint = "only to build CUDA C++ kernels; install the CUDA toolkit and set CUDA_HOME"
        return Fact("nvcc", "not found", "absent", hint=hint)
    release = next((line for line in _output_lines(nvcc, "--version") if "release" in line), None)
    if release is None:
        return Fact("nvcc", f"{nvcc} does not run", "problem", hint="reinstall the CUDA toolkit")
    return Fact("nvcc", f"{release.partition(', ')[2]}, {nvcc}", "ok")


def _extension_facts() -> list[Fact]:
    extension = backends.extension.loaded()
    module = extension.module
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if module is None:
        first = f"compiler: {compiler}" if compiler else "first a C++ compiler (apt install g++)"
        hint = f"`pip install -e .` in the source folder builds it; {first}"
        return [Fact("lora_engine._C", extension.problem or "not built", "problem", hint=hint)]
    variants = ", ".join(
        isa if runs else f"{isa} (not on this processor)" for isa, runs in module.built_isas()
    )
    return [
        Fact("lora_engine._C", str(module.__file__), "ok"),
        Fact("built for", variants),
        Fact("in use", module.isa()),
        _cuda_kernels_fact(),
    ]


def _cuda_kernels_fact() -> Fact:
    """What the extension's CUDA kernels are built for, and whether a GPU here is among it."""
    built = backends.cuda_architectures()
    if not built:
        hint = "no nvcc when it was built; Triton's kernels serve a GPU without them"
        return Fact("CUDA kernels", "not built", "absent", hint=hint)
    value = f"built for sm_{', sm_'.join(built)}"
    for gpu in machine.gpus():
        if not any(backends.runs_on(name, gpu.capability) for name in built):
            hint = "build again with a newer CUDA toolkit; until then Triton's kernels serve it"
            capability = backends.capability_text(gpu.capability)
            return Fact("CUDA kernels", f"{value}, not {capability}", "absent", hint=hint)
    return Fact("CUDA kernels", value, "ok")


def _kernel_facts() -> list[Fact]:
    devices = ["cpu", "cuda"] if machine.gpus() else ["cpu"]
    facts = []
    for operation in backends.OPERATIONS:
        for device in devices:
            choice = backends.explain(operation, device, torch.bfloat16)
            name = operation if len(devices) == 1 else f"{operation} ({device})"
            slow = choice.impl == "reference"
            value = "PyTorch reference" if slow else choice.reason
            facts.append(
                Fact(name, value, _status(not slow, "absent"), hint=choice.reason if slow else "")
            )
    return facts


def _package_facts() -> list[Fact]:
    """Each requirement of the package and of its extras: installed, and in the range asked for."""
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires(DISTRIBUTION) or []
        extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return [
            Fact(DISTRIBUTION, "not installed", "problem", hint="`pip install -e .` installs it")
        ]
    requirements = [Requirement(text) for text in declared]
    facts = []
    for extra in ["", *extras]:
        wanted = [r for r in requirements if _belongs(r, extra)]
        facts += [_requirement_fact(r, extra) for r in wanted]
    return facts


def _belongs(requirement: Any, extra: str) -> bool:
    """Whether the extra ("": the package itself) asks for this on this machine."""
    marker = requirement.marker
    if marker is None:
        return extra == ""
    return marker.evaluate({"extra": extra}) and (extra == "" or not marker.evaluate({"extra": ""}))


def _requirement_fact(requirement: Any, extra: str) -> Fact:
    version = machine.installed_version(requirement.name)
    install = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"
    name = f"{requirement.name} [{extra}]" if extra else requirement.name
    needed = extra in ("", "train")
    if version is None:
        return Fact(name, "not installed", "problem" if needed else "absent", hint=install)
    if not requirement.specifier.contains(version, prereleases=True):
        hint = f"needs {requirement.specifier}: {install}"
        return Fact(name, version, "problem", hint=hint)
    return Fact(name, version, "ok")


def _status(good: bool, otherwise: Status = "absent") -> Status:
    return "ok" if good else otherwise


def _output_lines(*command: str) -> list[str]:
    """Lines a program prints; none if it is not there or fails."""
    program = shutil.which(command[0])
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []
