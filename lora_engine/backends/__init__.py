"""What runs an operation on this machine, and why: the choice, the hardware, the extension.

`explain` answers for people, `select` for operations; both take their answer from `choice.choose`,
the one place that decides.
"""

from lora_engine.backends.choice import (
    BLOCKS,
    DTYPES,
    IMPLEMENTATIONS,
    OPERATIONS,
    Choice,
    dtypes_of,
)
from lora_engine.backends.copies import Copies, Copy, copies
from lora_engine.backends.devices import (
    gpu_count,
    has_own_memory,
    memory,
    moved,
    peak_memory_bytes,
    preferred_device,
    reads_beside_operands,
    release_freed_memory,
    reset_peak_memory,
    resident_bytes,
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
    cpu_features,
    keeps_scalars,
    reads_at_once,
    runs_on,
    triton_interpreted,
)
from lora_engine.backends.plans import PASSES, STRATEGIES
from lora_engine.backends.scratch import scratch_matrix
from lora_engine.backends.selection import (
    attention_plan,
    chunk_rows,
    decoded_rows,
    decoding_plan,
    explain,
    factors_plan,
    few_rows_impl,
    product_strategy,
    runs_fused,
    select,
    takes_one_pass,
    takes_one_query,
    updated_values,
)
from lora_engine.backends.timed_dtype import preferred_dtype

__all__ = [
    "BLOCKS",
    "DTYPES",
    "IMPLEMENTATIONS",
    "OPERATIONS",
    "PASSES",
    "STRATEGIES",
    "Choice",
    "Copies",
    "Copy",
    "Extension",
    "attention_plan",
    "capability",
    "capability_text",
    "chunk_rows",
    "copies",
    "cpu_features",
    "cuda_architectures",
    "decoded_rows",
    "decoding_plan",
    "dtypes_of",
    "explain",
    "extension_available",
    "factors_plan",
    "few_rows_impl",
    "gpu_count",
    "has_own_memory",
    "keep_freed_memory",
    "keeps_scalars",
    "memory",
    "moved",
    "native",
    "peak_memory_bytes",
    "preferred_device",
    "preferred_dtype",
    "product_strategy",
    "reads_at_once",
    "reads_beside_operands",
    "release_freed_memory",
    "reset_peak_memory",
    "resident_bytes",
    "runs_fused",
    "runs_on",
    "scratch_matrix",
    "select",
    "takes_one_pass",
    "takes_one_query",
    "triton_interpreted",
    "updated_values",
    "why_absent",
]
