"""Whole bfloat16 runs whose sizes fill no whole block of a matrix unit, under the operand guard."""

import pytest
import torch
from training_helpers import lines, make_examples

from lora_engine import accelerate
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.testing import tiny_llama, with_lora
from lora_engine.training.config import TrainConfig
from lora_engine.training.trainer import Trainer

SIZES = {"hidden_size": 33, "intermediate_size": 45, "heads": 3, "kv_heads": 1, "head_dim": 10}


@pytest.mark.parametrize("accelerated", [False, True], ids=["own", "accelerated"])
@pytest.mark.parametrize("vocab,dropout", [(260, 0.0), (261, 0.0), (264, 0.1)], ids=str)
def test_a_run_learns(tmp_path, vocab: int, dropout: float, accelerated: bool) -> None:
    model = tiny_llama(vocab_size=vocab, dtype=torch.bfloat16, initializer_range=0.2, **SIZES)
    model = with_lora(model, r=3, lora_dropout=dropout)
    if accelerated:
        accelerate(model, strict=True)
    data = TokenizedDataset(make_examples(24)), TokenizedDataset(make_examples(6, seed=1))
    config = TrainConfig(
        output_dir=tmp_path, max_steps=8, tokens_per_batch=64, learning_rate=2e-2, eval_every=4
    )
    Trainer(model, None, *data, config).fit()
    held_out = [line["heldout_loss"] for line in lines(tmp_path) if "heldout_loss" in line]
    assert len(held_out) == 3 and held_out[2] < held_out[0] - 0.1
