"""Which tokens of a batch attend to each other, worked out once for all layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.errors import UserError
from lora_engine.models.families.modules import Cache
from lora_engine.values import accumulate_dtype

# The mask of a packed batch whose layers all run lora_engine's attention, which read cu_seq_lens_q.
# transformers hands a mask of four dimensions on as it is; without one it would look whether the
# positions begin anew, for which the host waits for a GPU. It has no numbers.
NO_MASK = torch.empty(1, 1, 0, 0)


class LayerInputs(NamedTuple):
    """What transformers' layers are told of a batch, by its names, besides the hidden states."""

    position_embeddings: tuple[Tensor, Tensor] | None = None  # cos, sin [B or 1, L, D]
    attention_mask: Tensor | None = None  # [B, L], or [B, 1, Q, K]
    past_key_values: Cache | None = None
    cu_seq_lens_q: Tensor | None = None  # [S + 1] int32
    sequence_parents: Tensor | None = None  # [S] int32, as `Sequences.parents`
    max_length_q: int | None = None  # of the sequences of cu_seq_lens_q

    def keywords(self) -> dict[str, object]:
        """As arguments of a layer's own forward, which may not know what packed batches add."""
        packed = {
            "cu_seq_lens_q": self.cu_seq_lens_q,
            "sequence_parents": self.sequence_parents,
            "max_length_q": self.max_length_q,
        }
        return {
            "position_embeddings": self.position_embeddings,
            "attention_mask": self.attention_mask,
            "past_key_values": self.past_key_values,
            **{name: value for name, value in packed.items() if value is not None},
        }


class Sequences(NamedTuple):
    """A batch's tokens as packed sequences."""

    cu_seqlens: Tensor  # [S + 1] int32
    token_index: Tensor | None  # [T] places of the tokens in the batch's rows; None: all, in order
    cos: Tensor  # [T, D] in the type arithmetic is done in
    sin: Tensor  # [T, D]
    parents: Tensor | None = None  # [S] int32: the earlier sequence each continues, or -1
    equal_lengths: bool = False  # whether all are known to have as many tokens


class _Key(NamedTuple):
    """What sequences were found in."""

    shape: tuple[int, int]
    cos: Tensor
    sin: Tensor
    attention_mask: Tensor | None
    cu_seqlens: Tensor | None
    parents: Tensor | None
    longest: int | None

    def is_same(self, other: "_Key") -> bool:
        """Whether the tensors are the other's, not only equal to them."""
        return (
            self.shape == other.shape
            and self.cos is other.cos
            and self.sin is other.sin
            and self.attention_mask is other.attention_mask
            and self.cu_seqlens is other.cu_seqlens
            and self.parents is other.parents
            and self.longest == other.longest
        )


class SequenceFinder:
    """Finds a batch's Sequences; the same arguments, as from layer to layer, give the last ones."""

    def __init__(self) -> None:
        self._key: _Key | None = None
        self._found: Sequences | None = None

    def __call__(
        self,
        shape: tuple[int, int],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        parents: Tensor | None = None,
        longest: int | None = None,
    ) -> Sequences:
        """The sequences of a batch [B, L].

        From `cu_seqlens` over the flattened batch unless None; else from `attention_mask` [B, L],
        in which padding is 0 and the tokens of a row that have the same number are a sequence;
        else every row is one. `parents` and `longest`, the most tokens of a sequence, belong to
        `cu_seqlens`.
        """
        cos, sin = position_embeddings
        key = _Key(
            shape=shape,
            cos=cos,
            sin=sin,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            parents=parents,
            longest=longest,
        )
        if self._found is None or self._key is None or not key.is_same(self._key):
            sequences = _find(shape, position_embeddings, attention_mask, cu_seqlens, longest)
            self._found = sequences._replace(parents=parents)
            self._key = key
        return self._found


def _find(
    shape: tuple[int, int],
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int | None,
) -> Sequences:
    rows, length = shape
    index = None
    equal_lengths = False
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(torch.int32)
        # As many tokens as if all had the most: so all have.
        equal_lengths = longest is not None and longest * (len(bounds) - 1) == rows * length
    elif attention_mask is not None:
        bounds, index = of_mask(attention_mask)
    else:
        device = position_embeddings[0].device
        bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
        equal_lengths = True
    cos, sin = (_per_token(table, shape, index) for table in position_embeddings)
    return Sequences(
        cu_seqlens=bounds, token_index=index, cos=cos, sin=sin, equal_lengths=equal_lengths
    )


def of_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bounds of the sequences in a mask [B, L], and the places of its tokens; None: all."""
    index = mask.flatten().nonzero()[:, 0]
    row = torch.arange(mask.shape[0], device=mask.device)[:, None]
    owner = (row * (mask.shape[1] + 1) + mask).flatten()[index]
    starts = (owner[1:] != owner[:-1]).nonzero()[:, 0] + 1
    ends = starts.new_tensor([index.numel()])
    bounds = torch.cat((starts.new_zeros(1), starts, ends)).to(torch.int32)
    return bounds, None if index.numel() == mask.numel() else index


def _per_token(table: Tensor, shape: tuple[int, int], index: Tensor | None) -> Tensor:
    """cos or sin [B or 1, L, D] for each token [T, D]; UserError for tables of another shape."""
    rows, length = shape
    if table.shape[0] not in (1, rows) or table.shape[1] != length:
        raise UserError(
            f"position_ids are of {list(table.shape[:-1])} tokens, the batch is of "
            f"[{rows}, {length}]; give a position for each token"
        )
    flat = table.expand(rows, -1, -1).flatten(0, 1)
    if index is not None:
        flat = flat[index]
    return flat.to(accumulate_dtype(table.dtype)).contiguous()
