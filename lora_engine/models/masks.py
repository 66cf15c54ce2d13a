"""Which tokens attend to which, as transformers says it and as lora_engine's attention takes it.

transformers describes a mask by a function of indices, composed of a few of its own. Attention here
knows causal masks, windows, padding and packed sequences; any other mask is made whole.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Makers of transformers.masking_utils whose functions leave a causal mask one that attention knows.
_COMBINED = frozenset({"and_masks", "remap_positions_for_packed_sequence"})
_NARROWED = frozenset({"sliding_window_overlay", "packed_sequence_mask_function"})


def is_known(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask function is causal, but for a window and the bounds of packed sequences."""
    from transformers import masking_utils

    leaves = set(_leaves(mask_function, masking_utils.causal_mask_function))
    return "causal" in leaves and leaves <= {"causal", *_NARROWED}


def _leaves(mask_function: Any, causal: Callable[..., Any]) -> Iterator[str]:
    """The parts that a mask function is composed of; "" for one that is not known."""
    if mask_function is causal:
        yield "causal"
        return
    maker = getattr(mask_function, "__qualname__", "").partition(".")[0]
    if mask_function.__module__ != causal.__module__ or maker not in _COMBINED | _NARROWED:
        yield ""
        return
    if maker in _NARROWED:
        yield maker
        return
    for cell in mask_function.__closure__ or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            if callable(part):
                yield from _leaves(part, causal)


def dense_mask(
    cu_seqlens: Tensor,  # [S + 1] int32, over the tokens at token_index
    token_index: Tensor | None,  # [T]: places of the tokens in the batch's rows; None: all
    batch: int,
    length: int,
    *,
    causal: bool,
    window: int = 0,
) -> Tensor:
    """[B, 1, L, L] bool, True where a query (row) attends to a key (column).

    A token that is in no sequence attends to itself alone, so that its softmax is one.
    """
    device = cu_seqlens.device
    tokens = int(cu_seqlens[-1])
    places = torch.arange(tokens, device=device) if token_index is None else token_index
    lengths = cu_seqlens.diff().to(torch.int64)
    owners = torch.repeat_interleave(torch.arange(1, len(lengths) + 1, device=device), lengths)
    sequence = torch.zeros(batch * length, dtype=torch.int64, device=device)
    sequence[places] = owners
    sequence = sequence.view(batch, length)
    allowed = (sequence[:, :, None] == sequence[:, None, :]) & (sequence[:, :, None] > 0)
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    if causal:
        allowed &= distance >= 0
    if window:
        allowed &= distance < window
    allowed |= (distance == 0) & (sequence[:, :, None] == 0)
    return allowed[:, None]
