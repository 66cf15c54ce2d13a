"""Which tokens of a batch attend to each other, worked out once for all layers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_engine.values import accumulate_dtype


class Sequences(NamedTuple):
    """A batch's tokens as packed sequences."""

    cu_seqlens: Tensor  # [S + 1] int32
    token_index: Tensor | None  # [T] places of the tokens in the batch's rows; None: all, in order
    cos: Tensor  # [T, D] in the type arithmetic is done in
    sin: Tensor  # [T, D]
    parents: Tensor | None = None  # [S] int32: the earlier sequence each continues, or -1


class SequenceFinder:
    """Finds a batch's Sequences; the same arguments, as from layer to layer, give the last ones."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._found: Sequences | None = None

    def __call__(
        self,
        shape: tuple[int, int],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        parents: Tensor | None = None,
    ) -> Sequences:
        """The sequences of a batch [B, L].

        From `cu_seqlens` over the flattened batch where given; else from `attention_mask` [B, L],
        in which padding is 0 and the tokens of a row that have the same number are a sequence;
        else every row is one. `parents` belong to `cu_seqlens`.
        """
        key = (shape, *position_embeddings, attention_mask, cu_seqlens, parents)
        if self._found is None or not _same(key, self._key):
            sequences = _find(shape, position_embeddings, attention_mask, cu_seqlens)
            self._found = sequences._replace(parents=parents)
            self._key = key
        return self._found


def _same(key: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    if len(key) != len(other) or key[0] != other[0]:
        return False
    return all(a is b for a, b in zip(key[1:], other[1:], strict=True))


def _find(
    shape: tuple[int, int],
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Sequences:
    rows, length = shape
    index = None
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(torch.int32)
    elif attention_mask is not None:
        bounds, index = of_mask(attention_mask)
    else:
        bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    cos, sin = (_per_token(table, rows, index) for table in position_embeddings)
    return Sequences(bounds, index, cos, sin)


def of_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bounds of the sequences in a mask [B, L], and the places of its tokens; None: all."""
    index = mask.flatten().nonzero()[:, 0]
    row = torch.arange(mask.shape[0], device=mask.device)[:, None]
    owner = (row * (mask.shape[1] + 1) + mask).flatten()[index]
    starts = (owner[1:] != owner[:-1]).nonzero()[:, 0] + 1
    ends = starts.new_tensor([index.numel()])
    bounds = torch.cat((starts.new_zeros(1), starts, ends)).to(torch.int32)
    return bounds, None if index.numel() == mask.numel() else index


def _per_token(table: Tensor, rows: int, index: Tensor | None) -> Tensor:
    """cos or sin [B or 1, L, D] for each token [T, D]."""
    flat = table.expand(rows, -1, -1).flatten(0, 1)
    if index is not None:
        flat = flat[index]
    return flat.to(accumulate_dtype(table.dtype)).contiguous()
