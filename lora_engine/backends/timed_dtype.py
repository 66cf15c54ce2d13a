"""The dtype that a device multiplies fastest in."""

import json
import logging
import platform
import time
from pathlib import Path

import torch

from lora_engine.backends.hardware import computes_bfloat16
from lora_engine.files import user_cache_dir, write_text

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# bfloat16 has 8 bits of mantissa: a CPU must be clearly faster in it to be worth that.
_BFLOAT16_WORTH_FROM = 1.2

_log = logging.getLogger(__name__)


def preferred_dtype(device: str | torch.device) -> torch.dtype:
    """The faster of float32 and bfloat16 on `device`.

    A GPU: bfloat16 where it computes in it. A CPU: measured once with a small matrix multiply,
    and remembered in the user's cache folder for this CPU, number of threads and torch version.
    """
    device = torch.device(device)
    native = computes_bfloat16(device)
    if native is not None:
        return torch.bfloat16 if native else torch.float32
    key = f"{_cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = user_cache_dir() / "cpu_dtype.json"
    known = _read_known(path)
    if known.get(key) not in _DTYPES:
        seconds = {name: _matmul_seconds(_DTYPES[name]) for name in _DTYPES}
        ratio = seconds["float32"] / seconds["bfloat16"]
        known[key] = "bfloat16" if ratio >= _BFLOAT16_WORTH_FROM else "float32"
        _log.info("bfloat16 matrix multiplies run at %.1fx float32's rate here", ratio)
        try:
            write_text(path, json.dumps(known, indent=1))
        except OSError as error:  # a read-only home: measuring again costs little
            _log.warning("cannot remember the measurement in %s: %s", path, error)
    return _DTYPES[known[key]]


def _read_known(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # nothing measured yet, or not by us: measure anew
    return known if isinstance(known, dict) else {}


def _matmul_seconds(dtype: torch.dtype) -> float:
    """The quickest of a few [512,576] x [576,1536] products, after one to warm up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 576, generator=generator).to(dtype)
    weight = torch.randn(1536, 576, generator=generator).to(dtype)
    times = []
    with torch.inference_mode():
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
    return min(times[1:])


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
