"""Builds the extension lora_engine._C. Everything else about the package is in pyproject.toml.

The CPU kernels in csrc/cpu are compiled once for each instruction set, each in a namespace of its
own (LORA_ENGINE_ISA), and the best that the processor runs is chosen when the module is imported.
No torch header is used, so the build needs pybind11 and a C++17 compiler only.

Where nvcc is found (CUDA_HOME, PATH, /usr/local/cuda) the kernels in csrc/cuda become part of the
extension, machine code for each of CUDA_ARCHITECTURES (a file *_sm90.cu for 90a alone), and the
CUDA runtime is linked statically: the extension imports where there is no driver. Without nvcc they
are left out. What ptxas says about each file is kept beside its object in build/.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sysconfig import get_config_var

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

ISA_FLAGS = (
    {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4"],
        "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
        "amx_bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    }
    if X86
    else {"generic": []}
)
COMMON_FLAGS = ["-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No errno and no traps from arithmetic: what loops need to vectorise. NaN and inf stay exact.
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

CUDA_ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
NVCC_FLAGS += ["--threads", "0"]  # the architectures in parallel

SHARED_SOURCES = ["csrc/bindings.cpp", "csrc/cpu/bindings.cpp", "csrc/cpu/dispatch.cpp"]
SHARED_SOURCES += [
    "csrc/cpu/matrix_unit.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cpu/openmp_crowd.cpp",
    "csrc/triton/launcher.cpp",
]
KERNEL_SOURCES = sorted(
    {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")} - {*SHARED_SOURCES}
)
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))
CUDA_BINDINGS = "csrc/cuda/bindings.cpp"
HEADERS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "csrc").rglob("*")
    if path.suffix in (".hpp", ".cuh")
)


def headers_of(source: str) -> list[str]:
    """Headers that `source` may include: the kernels of one kind use none of the other's."""
    others = {"csrc/cpu": "csrc/cuda/", "csrc/cuda": "csrc/cpu/"}.get(os.path.dirname(source))
    return [header for header in HEADERS if others is None or not header.startswith(others)]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME if that is set, else the one on the PATH, else /usr/local/cuda's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_architectures(nvcc: str) -> list[str]:
    """Those of CUDA_ARCHITECTURES that this nvcc knows; none of an nvcc older than CUDA 12."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    found = [a for a in CUDA_ARCHITECTURES if f"sm_{a.rstrip('a')}" in known.stdout.split()]
    return found if "90a" in found else []


def architectures_of(source: str, architectures: list[str]) -> list[str]:
    """Those that a file of csrc/cuda is compiled for."""
    return ["90a"] if source.endswith("_sm90.cu") else architectures


def cuda_link_flags(nvcc: str) -> list[str]:
    """What links the CUDA runtime statically, from where this nvcc would."""
    dry = [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]
    printed = subprocess.run(dry, capture_output=True, text=True, check=True).stderr
    folders = re.findall(r'"-L([^"]+)"', printed)
    libraries = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    return [*(f"-L{folder}" for folder in folders), *libraries]


class BuildKernels(build_ext):
    """Compiles every kernel file once for each instruction set, files in parallel."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Kept between builds, also those that pip makes in a folder that it throws away.
        self.build_temp = str(ROOT / "build" / f"objects-{get_config_var('SOABI')}")

    def build_extension(self, ext: Pybind11Extension) -> None:
        nvcc = find_nvcc()
        architectures = cuda_architectures(nvcc) if nvcc else []
        print(f"nvcc: {nvcc or 'not found'}; CUDA kernels for: {architectures or 'nothing'}")
        macros = [("LORA_ENGINE_X86", "1")] if X86 else []
        shared, sources = "shared", [*SHARED_SOURCES]
        if architectures:
            macros.append(("LORA_ENGINE_CUDA_ARCHITECTURES", f'"{" ".join(architectures)}"'))
            # A folder of their own: objects made without CUDA are no use to a build with it.
            shared, sources = "-".join(["cuda", *architectures]), [*sources, CUDA_BINDINGS]
        jobs = [(source, shared, [*COMMON_FLAGS, "-O2"], macros) for source in sources]
        for isa, flags in ISA_FLAGS.items():
            for source in KERNEL_SOURCES:
                isa_macro = [("LORA_ENGINE_ISA", isa)]
                jobs.append((source, isa, [*COMMON_FLAGS, *KERNEL_FLAGS, *flags], isa_macro))

        def is_new(built: Path, source: str) -> bool:
            used = [source, "setup.py", *headers_of(source)]
            newest = max(os.path.getmtime(ROOT / name) for name in used)
            return built.exists() and built.stat().st_mtime > newest

        def compile_cuda(source: str) -> list[str]:
            built = Path(self.build_temp) / shared / Path(source).with_suffix(".o")
            if is_new(built, source):
                return [str(built)]
            built.parent.mkdir(parents=True, exist_ok=True)
            wanted = architectures_of(source, architectures)
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
            command = [nvcc, *NVCC_FLAGS, *targets, "-c", source, "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            built.with_suffix(".ptxas.txt").write_text(done.stderr)
            if done.returncode:
                raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            return [str(built)]

        def compile_one(job: tuple) -> list[str]:
            source, folder, flags, defines = job
            output = Path(self.build_temp) / folder
            built = output / Path(source).with_suffix(".o")
            if is_new(built, source):
                return [str(built)]
            return self.compiler.compile(
                [source],
                output_dir=str(output),
                macros=defines,
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [pool.submit(compile_cuda, s) for s in CUDA_SOURCES if architectures]
            compiled += [pool.submit(compile_one, job) for job in jobs]
            objects = [path for future in compiled for path in future.result()]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-fopenmp", "-s", *(cuda_link_flags(nvcc) if architectures else [])],
            target_lang="c++",
        )


setup(
    ext_modules=[Pybind11Extension("lora_engine._C", SHARED_SOURCES + KERNEL_SOURCES)],
    cmdclass={"build_ext": BuildKernels},
)
