"""The table of memory by format: a contender's numbers, and how they are shown."""

from pathlib import Path

import pytest

from benchmarks.train import quantized_memory
from lora_engine import quantize_model
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.testing import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("contender", ["bfloat16", "nf4-double", "int8"])
def test_one_contender(contender: str, tmp_path: Path) -> None:
    tiny_llama(vocab_size=300, layers=1).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--one", contender, "--tokens", "16"]
    row = quantized_memory.run_one(quantized_memory.parse_arguments(argv))
    assert 5 < row["loss"] < 6.5  # ln 300 is 5.7
    assert row["weights"] > 0 and row["step_seconds"] > 0
    assert contender in quantized_memory.table({contender: row})


def test_weights_count_scales_and_each_storage_once() -> None:
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    dense = sum(p.nbytes for p in model.parameters())
    assert quantized_memory.weight_bytes(model) == dense
    linears = sum(
        m.weight.nbytes for m in model.model.layers.modules() if hasattr(m, "in_features")
    )
    quantize_model(model, "int8")
    packed = sum(m.quantized.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    assert quantized_memory.weight_bytes(model) == dense - linears + packed
