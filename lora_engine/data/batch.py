"""Packed batches: many sequences in one row of tokens, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_engine.data.render import Example


@dataclass(frozen=True)
class PackedBatch:
    """S sequences of together T tokens, and the U tokens that the loss is taken over.

    input_ids: int64 [T].
    position_ids: int64 [T], from 0 in every sequence.
    cu_seqlens: int32 [S+1]; sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
    max_seqlen: tokens of the longest sequence.
    target_index: int64 [U], ascending; positions whose next token, in the same sequence, is
        supervised. The hidden state there predicts it.
    target_ids: int64 [U], those next tokens.
    origins: where each sequence comes from, length S.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    target_index: Tensor
    target_ids: Tensor
    origins: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        """U."""
        return self.target_index.numel()

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=non_blocking)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def collate(examples: Sequence[Example]) -> PackedBatch:
    """Pack `examples`, in their order, into one batch on the CPU.

    Raises ValueError for no examples, or an empty one.
    """
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    if lengths.size == 0 or lengths.min() == 0:
        raise ValueError(f"cannot pack {lengths.size} examples of lengths {lengths.tolist()}")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    input_ids = np.concatenate([np.asarray(e.input_ids, dtype=np.int64) for e in examples])
    supervised = np.concatenate([np.asarray(e.supervised, dtype=np.bool_) for e in examples])
    supervised[starts] = False  # nothing of the same sequence precedes its first token
    targets = np.flatnonzero(supervised)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        target_index=torch.from_numpy(targets - 1),
        target_ids=torch.from_numpy(input_ids[targets]),
        origins=tuple(example.origin for example in examples),
    )
