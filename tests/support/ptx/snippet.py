"""A few instructions of PTX on one warp, for tests of what they do."""

from collections.abc import Mapping, Sequence

import numpy as np

from ptx.kernel import Completion, Kernel

DTYPES = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}
HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"

Values = Sequence[float] | Sequence[int] | np.ndarray


def module(parameters: Sequence[str], body: str, declarations: str = "") -> str:
    """A module with one kernel, `snippet`, whose parameters are addresses of these names."""
    listed = ", ".join(f".param .u64 {name}" for name in parameters)
    return f"{HEAD}{declarations}\n.visible .entry snippet({listed})\n{{\n{body}\n}}\n"


def evaluate(
    code: str,
    results: Mapping[str, str],
    inputs: Mapping[str, tuple[str, Values]] | None = None,
    *,
    threads: int = 32,
    shared: int = 0,
    completion: Completion = "late",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Runs `code` in a CTA, and returns its result registers as arrays [threads].

    results: names of registers and their types. inputs: the same, and a value for each thread; if
    they are fewer, zeros follow. The code may use %t (the thread's index, 32 bits), predicates %p0
    to %p9, registers %r0 to %r99 and %w0 to %w99 of 32 and 64 bits, and `memory`, dynamic shared.
    """
    inputs = inputs or {}
    kinds = {**{name: kind for name, (kind, _) in inputs.items()}, **results}
    lines = [".reg .pred %p<10>; .reg .b32 %r<100>; .reg .b64 %w<100>, %at, %off; .reg .b32 %t;"]
    lines += [f".reg .b{_register_bits(kind)} {name};" for name, kind in kinds.items()]
    lines.append("mov.u32 %t, %tid.x;")

    def address(name: str, kind: str) -> list[str]:
        size = np.dtype(DTYPES[kind]).itemsize
        return [f"ld.param.u64 %at, [{name}_p];", f"mad.wide.u32 %at, %t, {size}, %at;"]

    for name, (kind, _) in inputs.items():
        bits = 8 * np.dtype(DTYPES[kind]).itemsize
        lines += [*address(name, kind), f"ld.global.b{bits} {name}, [%at];"]
    lines += [code]
    for name, kind in results.items():
        bits = 8 * np.dtype(DTYPES[kind]).itemsize
        lines += [*address(name, kind), f"st.global.b{bits} [%at], {name};"]
    text = module(
        [f"{name}_p" for name in kinds],
        "\n".join([*lines, "ret;"]),
        ".extern .shared .align 16 .b8 memory[];",
    )
    arrays = {}
    for name, kind in kinds.items():
        arrays[name] = np.zeros(threads, DTYPES[kind])
    for name, (_, values) in inputs.items():
        arrays[name][: len(values)] = values
    kernel = Kernel(text)
    kernel.launch(
        (1,), threads, [arrays[name] for name in kinds],
        shared=shared, completion=completion, seed=seed,
    )  # fmt: skip
    return {name: arrays[name] for name in results}


def _register_bits(kind: str) -> int:
    return max(16, 8 * np.dtype(DTYPES[kind]).itemsize)
