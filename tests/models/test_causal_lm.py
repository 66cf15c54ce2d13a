import pytest
import torch

import lora_engine
from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.render import Example
from lora_engine.models.packed import packed_hidden_states
from lora_engine.testing import tiny_llama, with_lora


def packed(lengths: list[int]) -> PackedBatch:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]
    return collate([Example(row, [True] * len(row), "made", False) for row in rows])


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_hidden_states_are_those_of_each_sequence_alone(accelerated: bool) -> None:
    model = with_lora(tiny_llama())
    batch = packed([5, 1, 17])
    expected = [
        model.get_base_model().model(input_ids=ids[None]).last_hidden_state[0]
        for ids in batch.input_ids.split([5, 1, 17])
    ]
    if accelerated:
        lora_engine.accelerate(model)
    hidden = packed_hidden_states(model, batch)
    assert torch.allclose(hidden, torch.cat(expected), atol=1e-5)
