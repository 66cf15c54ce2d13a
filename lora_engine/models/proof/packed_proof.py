"""Whether training on packed batches is training of the model: tried once, before it begins."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_engine.errors import UserError
from lora_engine.models.attach.head import output_head, transformers_model
from lora_engine.models.attach.packed import packed_hidden_states
from lora_engine.models.attach.scalar_head import scalar_head
from lora_engine.models.proof.closeness import coarsest_dtype, typical
from lora_engine.models.proof.proof import measuring, probe_tokens

_LENGTHS = (4, 5)
# The relative difference of the median token's logits that rounding in all layers may make.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


class _Probe(NamedTuple):
    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int = max(_LENGTHS)
    parents: Tensor | None = None


def check_packed_training(model: nn.Module) -> None:
    """Raises UserError unless the head's product with packed hidden states is the model's logits.

    Training computes log-probabilities, and so every objective, from that product. It differs where
    the model changes hidden states or logits around its head, or where packed sequences would see
    each other. Two short sequences are tried. Of a model with a scalar head in place of one for
    tokens its value at the last token is.
    """
    inner = transformers_model(model)
    ids = probe_tokens(inner, 1, sum(_LENGTHS))[0]
    bounds = torch.tensor([0, *_LENGTHS], device=ids.device).cumsum(0)
    positions = torch.cat([torch.arange(n, device=ids.device) for n in _LENGTHS])
    with measuring(model):
        alone = [model(input_ids=part[None]).logits[0] for part in ids.split(_LENGTHS)]
        hidden = packed_hidden_states(model, _Probe(ids, positions, bounds.to(torch.int32)))
        if inner.get_output_embeddings() is None:
            last = hidden[bounds[1:] - 1]
            packed = list(scalar_head(model)(last)[:, None].split(1))
        else:
            head = output_head(model)
            logits = head.logits(hidden) if hidden.shape[-1] == head.weight.shape[1] else hidden
            packed = list(logits.split(_LENGTHS))
    tolerance = _TOLERANCE[coarsest_dtype(inner)]
    for expected, actual in zip(map(torch.atleast_2d, alone), packed, strict=True):
        if actual.shape != expected.shape or typical(
            (actual - expected).float()
        ) > tolerance * typical(expected.float()):
            raise UserError(
                f"{type(inner).__name__}: its logits are not its head's product with the hidden "
                "states of packed sequences, so the loss would not be its own: train it with "
                "transformers' Trainer, which lora_engine.accelerate(model) leaves its loss"
            )
