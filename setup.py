"""Builds the extension lora_engine._C. Everything else about the package is in pyproject.toml.

The CPU kernels in csrc/cpu are compiled once for each instruction set, each in a namespace of its
own (LORA_ENGINE_ISA), and the best that the processor runs is chosen when the module is imported.
No torch header is used, so the build needs pybind11 and a C++17 compiler only.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sysconfig import get_config_var

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

ISA_FLAGS = (
    {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4"],
        "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    }
    if X86
    else {"generic": []}
)
COMMON_FLAGS = ["-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
# No errno and no traps from arithmetic: what loops need to vectorise. NaN and inf stay exact.
KERNEL_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]

SHARED_SOURCES = ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/memory.cpp"]
KERNEL_SOURCES = sorted(
    {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp")} - {*SHARED_SOURCES}
)
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.hpp"))


class BuildKernels(build_ext):
    """Compiles every kernel file once for each instruction set, files in parallel."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Kept between builds, also those that pip makes in a folder that it throws away.
        self.build_temp = str(ROOT / "build" / f"objects-{get_config_var('SOABI')}")

    def build_extension(self, ext: Pybind11Extension) -> None:
        macros = [("LORA_ENGINE_X86", "1")] if X86 else []
        jobs = [(source, "shared", [*COMMON_FLAGS, "-O2"], macros) for source in SHARED_SOURCES]
        for isa, flags in ISA_FLAGS.items():
            for source in KERNEL_SOURCES:
                isa_macro = [("LORA_ENGINE_ISA", isa)]
                jobs.append((source, isa, [*COMMON_FLAGS, *KERNEL_FLAGS, *flags], isa_macro))

        def compile_one(job: tuple) -> list[str]:
            source, folder, flags, defines = job
            output = Path(self.build_temp) / folder
            newest = max(os.path.getmtime(ROOT / name) for name in [source, *HEADERS, "setup.py"])
            built = output / Path(source).with_suffix(".o")
            if built.exists() and built.stat().st_mtime > newest:
                return [str(built)]
            return self.compiler.compile(
                [source],
                output_dir=str(output),
                macros=defines,
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-fopenmp", "-s"],
            target_lang="c++",
        )


setup(
    ext_modules=[Pybind11Extension("lora_engine._C", SHARED_SOURCES + KERNEL_SOURCES)],
    cmdclass={"build_ext": BuildKernels},
)
