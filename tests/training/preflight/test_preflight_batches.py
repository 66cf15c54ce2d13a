"""Batches that teach nothing or that the model cannot take, each refused in one line."""

import pytest
import torch
import transformers
from torch import nn
from training_helpers import VOCAB, make_examples, one_batch, rows, tiny_llama, tiny_lora

from lora_engine import UserError, preflight
from lora_engine.data.render import Example


def with_labels(change):
    batch = rows()
    change(batch["labels"])
    return batch


def labels_set(index, value):
    return with_labels(lambda labels: labels.__setitem__(index, value))


def shifted():
    return nn.functional.pad(rows()["labels"][:, 1:], (0, 1), value=-100)


BEYOND = (f"labels of the batch hold {VOCAB}", f"{VOCAB} rows", f"from 0 to {VOCAB - 1}, or -100")
WRONG = {
    "label beyond the vocabulary": (labels_set((1, 4), VOCAB), BEYOND),
    "negative label": (labels_set((1, 4), -1), ("labels of the batch hold -1", "or -100")),
    "all ignored": (labels_set(..., -100), ("no token", "every label is -100")),
    "all ignored by another number": (
        {**labels_set(..., -7), "ignore_index": -7},
        ("no token", "every label is -7"),
    ),
    "ignored all but the first": (labels_set((..., slice(1, None)), -100), ("no token",)),
    "float labels": (
        {**rows(), "labels": rows()["labels"].float()},
        ("labels of the batch are float32", "int64"),
    ),
    "labels of another shape": (
        {**rows(), "labels": rows()["labels"][:, 1:]},
        ("labels have shape [3, 11] and input_ids [3, 12]",),
    ),
    "arrays": (
        {key: value.numpy() for key, value in rows().items()},
        ("of the batch is a ndarray", "tensor"),
    ),
    "an array that no model knows": (
        {**rows(), "weights": rows()["labels"].numpy()},
        ("weights of the batch is a ndarray", "tensor"),
    ),
    "positions in lists": (
        {**rows(), "position_ids": [list(range(12))]},
        ("position_ids of the batch is a list", "tensor"),
    ),
    "labels of 32 bits": (
        {**rows(), "labels": rows()["labels"].int()},
        ("labels of the batch are int32", "give int64"),
    ),
    "a mask that shows nothing": (
        {**rows(), "attention_mask": torch.zeros_like(rows()["input_ids"])},
        ("attention_mask of the batch is 0 everywhere", "give 1 for tokens"),
    ),
    "tokens in one line": (
        {key: value[0] for key, value in rows().items()},
        ("does not take the batch, input_ids [12] int64", "as [batch, length]"),
    ),
    "fewer positions than tokens": (
        {**rows(), "position_ids": torch.arange(5)[None]},
        ("position_ids [1, 5] int64", "give position_ids as long as input_ids"),
    ),
    "positions of other rows": (
        {**rows(), "position_ids": torch.arange(12).repeat(2, 1)},
        ("does not take the batch", "position_ids [2, 12] int64: "),
    ),
    "tokens twice": (
        {**rows(), "inputs_embeds": torch.zeros(3, 12, 8)},
        ("does not take the batch", "inputs_embeds [3, 12, 8] float32", "exactly one of"),
    ),
    "an unnamed argument": ({**rows(), 7: 7}, ("does not take the batch", "must be strings")),
    "labels in lists": (
        {**rows(), "labels": rows()["labels"].tolist()},
        ("labels of the batch is a list", "tensor"),
    ),
    "token beyond the vocabulary": (
        {**rows(), "input_ids": rows()["input_ids"] + VOCAB},
        ("input_ids of the batch hold", f"from 0 to {VOCAB - 1}"),
    ),
    "shifted labels beyond the vocabulary": (
        {**rows(), "shift_labels": rows()["labels"].clamp(min=0) + VOCAB},
        ("labels of the batch hold",),
    ),
    "no rows": ({key: value[:0] for key, value in rows().items()}, ("the batch is empty",)),
    "no tokens": ({key: value[:, :0] for key, value in rows().items()}, ("the batch is empty",)),
    "nothing": ({}, ("the batch is empty",)),
    "one token": ({key: value[:, :1] for key, value in rows().items()}, ("hold one token",)),
    "labels that are shifted already": (
        {**rows(), "labels": shifted()},
        ("labels of the batch are off by one token", "the model shifts them once more"),
    ),
    "shift_labels that are not shifted": (
        {**rows(), "shift_labels": rows()["labels"]},
        ("shift_labels of the batch are off by one token", "shift them by one"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_batches_are_refused_in_one_line(case):
    batch, words = WRONG[case]
    with pytest.raises(UserError) as caught:
        preflight(tiny_lora(), batch)
    line = str(caught.value)
    assert line.startswith("preflight: ") and "\n" not in line
    for word in words:
        assert word in line


def test_what_a_loss_of_ones_own_raises_is_raised():
    def loss(model, batch):
        raise KeyError("answers")

    with pytest.raises(KeyError, match="answers"):
        preflight(tiny_lora(), rows(), loss=loss)


def test_a_packed_batch_beyond_the_vocabulary():
    batch = one_batch([*make_examples(2), Example([1, 2, VOCAB], [False, True, True], "a:3")])
    with pytest.raises(UserError, match=f"hold {VOCAB}, and the model's vocabulary has {VOCAB}"):
        preflight(tiny_lora(), batch)


def test_labels_that_are_shifted_for_the_model_pass():
    report = preflight(tiny_lora(), {**rows(), "shift_labels": shifted()})
    assert report.loss_before == pytest.approx(preflight(tiny_lora(), rows()).loss_before)


def test_repeated_tokens_do_not_look_shifted():
    batch = rows()
    batch["input_ids"][:], batch["labels"][:] = 5, 5
    assert preflight(tiny_lora(), batch).unreached == 0


def test_labels_that_another_index_ignores_pass():
    batch = labels_set((1, 4), -7)
    batch["labels"][batch["labels"] == -100] = -7
    report = preflight(tiny_lora(), {**batch, "ignore_index": -7})
    assert report.loss_after < 0.99 * report.loss_before


def test_labels_of_other_kinds_of_models_are_theirs():
    llama = tiny_llama()
    llama.config.num_labels, llama.config.pad_token_id = 1, 0
    for labels in (torch.tensor([0.5, -1.5, 2.0]), torch.tensor([-3.0, 99.0, 0.0])):
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(llama.config)
        report = preflight(model, {**rows(), "labels": labels})
        assert report.loss_after < 0.99 * report.loss_before


def test_labels_of_a_loss_of_the_users_own_are_theirs():
    model = tiny_llama()
    model.loss_function = lambda logits, labels, **_: (logits[..., 0] - labels).square().mean()
    report = preflight(model, {**rows(), "labels": rows()["labels"].float() / 7})
    assert report.loss_after < 0.99 * report.loss_before
