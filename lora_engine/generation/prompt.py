"""The log-probabilities of a prompt's own tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_engine.generation.sampling import Likeliest, likeliest
from lora_engine.models.attach.head import output_head, transformers_model, why_no_head

_ROWS = 64  # of logits at once


@dataclass(frozen=True)
class Read:
    """A token of a prompt, its log-probability after those before it, and the likeliest in its
    place; of the first token None and none."""

    token: int
    logprob: float | None
    likeliest: Likeliest


def read_prompt(
    model: nn.Module, prompt_ids: Sequence[int], *, count: int = 0, temperature: float = 1.0
) -> list[Read]:
    """Each token of the prompt, which has at least one, with `count` of the likeliest.

    model: a transformers (or PEFT) causal language model in evaluation mode; gradients are off.
    temperature: what logits are divided by. Few rows of logits are in memory at once where the
    model's head is one that `output_head` takes.
    """
    read = [Read(prompt_ids[0], None, ())]
    following = iter(prompt_ids[1:])
    for logits in _logits(model, prompt_ids[:-1]):
        for row in (logits.float() / temperature).log_softmax(-1):
            token = next(following)
            read.append(Read(token, float(row[token]), likeliest(row, count)))
    return read


def _logits(model: nn.Module, ids: Sequence[int]) -> Iterator[Tensor]:
    """Logits [rows, V] after each of the tokens."""
    if not ids:
        return
    device = next(model.parameters()).device
    row = torch.tensor([list(ids)], device=device)
    if why_no_head(model) is not None:
        yield model(input_ids=row, use_cache=False).logits[0]
        return
    backbone = transformers_model(model).base_model
    hidden: Tensor = backbone(input_ids=row, use_cache=False).last_hidden_state[0]
    head = output_head(model)
    for part in hidden.to(head.weight.dtype).split(_ROWS):
        yield head.logits(part)
