"""Which tokens attend to which, as transformers says it and as lora_engine's attention takes it.

transformers describes a mask by a function of indices, composed of a few of its own. Attention here
knows causal masks, windows, padding and packed sequences; any other mask is made whole.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

# Makers of transformers.masking_utils whose functions only combine other mask functions.
_COMBINING = frozenset({"and_masks", "remap_positions_for_packed_sequence"})


class CausalMask(NamedTuple):
    """A causal mask as attention here knows it."""

    window: int = 0  # a token sees itself and window - 1 before it; 0: all before it
    sequences: Tensor | None = None  # [B, L] int64: the number of each token's packed sequence


def causal_mask(mask_function: Callable[..., object]) -> CausalMask | None:
    """What a mask function of transformers says; None if it is more than a CausalMask."""
    from transformers import masking_utils

    window, sequences, is_causal = 0, None, False
    for leaf in _leaves(mask_function, masking_utils):
        maker, held = leaf
        if maker == "causal":
            is_causal = True
        elif maker == "sliding_window_overlay" and isinstance(held, int) and held > 0:
            window = min(window, held) if window else held
        elif maker == "packed_sequence_mask_function" and isinstance(held, Tensor):
            if sequences is not None:
                return None
            sequences = held
        else:
            return None
    return CausalMask(window, sequences) if is_causal else None


def has_holes(
    mask: Tensor,  # [B, L] bool
) -> bool:
    """Whether padding lies between tokens of a row."""
    edges = 2 - mask[:, 0].int() - mask[:, -1].int()
    return bool(((mask[:, 1:] != mask[:, :-1]).sum(1) > edges).any())


def _leaves(
    mask_function: Callable[..., object], makers: ModuleType
) -> Iterator[tuple[str, object]]:
    """The parts that a mask function is composed of: their maker's name and what it was given.

    ("", None) for a part that transformers.masking_utils (`makers`) did not make.
    """
    if mask_function is makers.causal_mask_function:
        yield "causal", None
        return
    maker = getattr(mask_function, "__qualname__", "").partition(".")[0]
    if mask_function.__module__ != makers.__name__ or not maker:
        yield "", None
        return
    held = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    if maker not in _COMBINING:
        yield maker, held[0] if len(held) == 1 else None
        return
    for each in held:
        for part in each if isinstance(each, tuple) else (each,):
            if callable(part) and not isinstance(part, Tensor):
                yield from _leaves(part, makers)


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
