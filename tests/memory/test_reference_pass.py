"""What the pass of the reference holds: the tensors of one layer, however many there are."""

import pytest
import torch

import lora_engine
from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.evaluation.batch_loss import batch_loss, reference_logprobs
from lora_engine.memory.measured import peak_cpu_bytes
from lora_engine.objectives import SFT
from lora_engine.testing import tiny_llama as llama_of
from lora_engine.testing import with_lora

HIDDEN, TOKENS = 64, 256


def peaks_of(layers, accelerate):
    """Of the pass of the reference, and of one that is learned from, in tensors [tokens, hidden] of
    float32."""
    model = with_lora(
        llama_of(hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, layers=layers, kv_heads=4)
    )
    if accelerate:
        lora_engine.accelerate(model)
    model.train()
    ids = torch.randint(97, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = collate([Example(ids, [False] * (TOKENS - 8) + [True] * 8, "made:1")])
    works = (lambda: reference_logprobs(model, batch), lambda: batch_loss(model, batch, SFT()))
    return [peak_cpu_bytes(work) / (HIDDEN * TOKENS * 4) for work in works]


@pytest.mark.parametrize("accelerate", [True, False], ids=["ours", "transformers"])
def test_a_layer_more_costs_the_reference_nothing(accelerate):
    (few, learned), (many, learned_of_many) = (peaks_of(layers, accelerate) for layers in (4, 8))
    assert many - few < 0.1
    assert learned_of_many - learned > 4 * 5, "what is learned from is kept"
