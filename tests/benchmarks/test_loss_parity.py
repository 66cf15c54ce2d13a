import copy
import math
import random

import pytest
import torch

from benchmarks.train import loss_parity
from benchmarks.train.train_contenders import train_ours
from lora_engine.data.render import Example
from lora_engine.testing import tiny_llama, with_lora

VOCAB = 97
LEARNING_RATE = 1e-2  # so that a wrong update shows in the next loss
TOLERANCE = 1e-5


def random_batches(steps: int, batch_size: int, seed: int = 0) -> list[list[Example]]:
    """Examples of 2 to 40 tokens whose second half is supervised."""
    rng = random.Random(seed)
    batches = []
    for _ in range(steps):
        lengths = [rng.randint(2, 40) for _ in range(batch_size)]
        batches.append(
            [
                Example(
                    [rng.randrange(VOCAB) for _ in range(length)],
                    [position >= length // 2 for position in range(length)],
                )
                for length in lengths
            ]
        )
    return batches


@pytest.fixture
def model():
    return with_lora(tiny_llama(vocab_size=VOCAB, attn_implementation="eager"))


def train_both(model, batches, **settings):
    theirs = list(loss_parity.train_plainly(copy.deepcopy(model), batches, LEARNING_RATE))
    settings = {"learning_rate": LEARNING_RATE, "max_grad_norm": None, **settings}
    return list(train_ours(model, batches, **settings)), theirs


def test_ten_steps_have_peft_s_loss(model):
    batches = random_batches(steps=10, batch_size=5)
    ours, theirs = train_both(model, batches)
    differences = loss_parity.relative_differences(ours, theirs)
    assert loss_parity.within(differences, TOLERANCE), differences


@pytest.mark.parametrize(
    "setting",
    [{"learning_rate": 1.1 * LEARNING_RATE}, {"beta2": 0.9}, {"max_grad_norm": 0.1}],
    ids=lambda setting: next(iter(setting)),
)
def test_another_update_is_noticed(model, setting):
    batches = random_batches(steps=6, batch_size=5)
    ours, theirs = train_both(model, batches, **setting)
    differences = loss_parity.relative_differences(ours, theirs)
    assert differences[0] <= TOLERANCE  # the weights were the same still
    assert not loss_parity.within(differences, TOLERANCE)


def test_a_loss_that_is_no_number_is_not_within():
    assert not loss_parity.within([0.0, math.nan], 1e-4)


def test_padding_keeps_tokens_and_labels():
    padded = loss_parity.pad([Example([5, 6, 7], [False, True, True]), Example([8], [True])])
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert padded["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert all(x.dtype == torch.int64 for x in padded.values())
