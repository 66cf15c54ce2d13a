"""What runs an operation on this machine, and why: the choice, the hardware, the extension.

`explain` answers for people, `select` for operations; both take their answer from `choice.choose`,
the one place that decides.
"""

from lora_engine.backends.choice import (
    BLOCKS,
    DTYPES,
    IMPLEMENTATIONS,
    OPERATIONS,
    PASSES,
    STRATEGIES,
    Choice,
)
from lora_engine.backends.devices import (
    gpu_count,
    keeps_freed_memory,
    memory,
    moved,
    peak_memory_bytes,
    preferred_device,
    reset_peak_memory,
    why_absent,
)
from lora_engine.backends.extension import (
    Extension,
    cuda_architectures,
    extension_available,
    keep_freed_memory,
    native,
)
from lora_engine.backends.hardware import (
    capability,
    capability_text,
    computes_bfloat16,
    cpu_features,
    keeps_scalars,
    reads_at_once,
    runs_on,
    triton_interpreted,
)
from lora_engine.backends.selection import (
    chunk_rows,
    decoded_rows,
    explain,
    product_strategy,
    runs_fused,
    select,
    takes_few_rows,
    takes_one_pass,
    takes_one_query,
)

__all__ = [
    "BLOCKS",
    "DTYPES",
    "IMPLEMENTATIONS",
    "OPERATIONS",
    "PASSES",
    "STRATEGIES",
    "Choice",
    "Extension",
    "capability",
    "capability_text",
    "chunk_rows",
    "computes_bfloat16",
    "cpu_features",
    "cuda_architectures",
    "decoded_rows",
    "explain",
    "extension_available",
    "gpu_count",
    "keep_freed_memory",
    "keeps_freed_memory",
    "keeps_scalars",
    "memory",
    "moved",
    "native",
    "peak_memory_bytes",
    "preferred_device",
    "product_strategy",
    "reads_at_once",
    "reset_peak_memory",
    "runs_fused",
    "runs_on",
    "select",
    "takes_few_rows",
    "takes_one_pass",
    "takes_one_query",
    "triton_interpreted",
    "why_absent",
]
