"""Packed batches: many sequences in one row of tokens, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.data.prefixes import Segment, shared_segments, whole_segments
from lora_engine.data.render import Example


@dataclass(frozen=True)
class PackedBatch:
    """Examples as S sequences of together T tokens, and the U tokens that the loss is taken over.

    input_ids: int64 [T].
    position_ids: int64 [T]; a sequence counts on from the one it continues, else from 0.
    cu_seqlens: int32 [S+1]; sequence s is tokens cu_seqlens[s] to cu_seqlens[s+1].
    parents: int32 [S]: the earlier sequence each one continues, or -1; None: every sequence is a
        whole example.
    max_seqlen: tokens of the longest example.
    target_index: int64 [U], by example; positions whose next token, in the same example, is
        supervised. The hidden state there predicts it. A shared position stands once for each.
    target_ids: int64 [U], those next tokens.
    target_counts: targets of each example, which stand together in target_index.
    origins: where each example comes from.
    num_tokens: tokens of the examples, shared ones counted for each.
    adapters: name of the adapter of each sequence, S of them; none if no example names one.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    parents: Tensor | None
    max_seqlen: int
    target_index: Tensor
    target_ids: Tensor
    target_counts: tuple[int, ...]
    origins: tuple[str, ...]
    num_tokens: int
    adapters: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        """T, at most num_tokens."""
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        """U."""
        return self.target_index.numel()

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with its tensors on `device`; the host waits for no GPU."""
        return replace(
            self,
            input_ids=backends.moved(self.input_ids, device),
            position_ids=backends.moved(self.position_ids, device),
            cu_seqlens=backends.moved(self.cu_seqlens, device),
            parents=None if self.parents is None else backends.moved(self.parents, device),
            target_index=backends.moved(self.target_index, device),
            target_ids=backends.moved(self.target_ids, device),
        )


def collate(examples: Sequence[Example], *, share_prefixes: bool = False) -> PackedBatch:
    """Pack `examples` into one batch on the CPU.

    In their order; with `share_prefixes` tokens that examples begin with in common are one
    sequence, which the rest of each continues, if the same adapter learns from them. The loss and
    its gradients are the same.

    Raises ValueError for no examples, or an empty one.
    """
    lengths = [len(example.input_ids) for example in examples]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"cannot pack {len(lengths)} examples of lengths {lengths}")
    tokens = [np.asarray(example.input_ids, dtype=np.int64) for example in examples]
    adapters = [example.adapter for example in examples]
    segments = shared_segments(tokens, kinds=adapters) if share_prefixes else whole_segments(tokens)
    sizes = np.array([segment.end - segment.start for segment in segments], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    rows = _rows(segments, bounds, lengths)
    target_index, target_ids = [], []
    for example, ids, places in zip(examples, tokens, rows, strict=True):
        # Nothing of the same example precedes its first token.
        targets = np.flatnonzero(np.asarray(example.supervised, dtype=np.bool_)[1:]) + 1
        target_index.append(places[targets - 1])
        target_ids.append(ids[targets])
    parents = np.array([segment.parent for segment in segments], dtype=np.int32)
    return PackedBatch(
        input_ids=torch.from_numpy(
            np.concatenate([tokens[s.members[0]][s.start : s.end] for s in segments])
        ),
        position_ids=torch.from_numpy(
            np.concatenate([np.arange(s.start, s.end) for s in segments])
        ),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        parents=torch.from_numpy(parents) if (parents >= 0).any() else None,
        max_seqlen=max(lengths),
        target_index=torch.from_numpy(np.concatenate(target_index)),
        target_ids=torch.from_numpy(np.concatenate(target_ids)),
        target_counts=tuple(map(len, target_ids)),
        origins=tuple(example.origin for example in examples),
        num_tokens=sum(lengths),
        adapters=tuple(adapters[s.members[0]] for s in segments) if any(adapters) else (),
    )


def _rows(
    segments: Sequence[Segment], bounds: np.ndarray, lengths: Sequence[int]
) -> list[np.ndarray]:
    """Where in the batch each token of each example stands."""
    rows = [np.empty(length, dtype=np.int64) for length in lengths]
    for segment, begin, end in zip(segments, bounds[:-1], bounds[1:], strict=True):
        for member in segment.members:
            rows[member][segment.start : segment.end] = np.arange(begin, end)
    return rows
