"""Packed batches: many sequences in one row of tokens, without padding."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.data.prefixes import Segment, shared_segments, whole_segments
from lora_engine.data.render import EXAMPLE_WEIGHT, TARGET, WEIGHT, Example

# The role of examples whose log-probabilities alone are read, for a statistic.
MISMATCHED = "mismatched"


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
    last_index: int64 [E]; where the last token of each of the E examples stands.
    roles: `Example.role` of each example; none if no example has one.
    columns: float32, [E] or [U], by name: numbers for the objective, of each example or target.
    mismatched: the examples of that role, which are in no other field; None if there are none.
    statistics: scalars by name that the objective took over all batches of a step.
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
    last_index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    roles: tuple[str, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    mismatched: "PackedBatch | None" = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_examples(self) -> int:
        """E."""
        return len(self.target_counts)

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

    def with_role(self, role: str) -> list[int]:
        """The places of the examples of a role."""
        return [place for place, own in enumerate(self.roles) if own == role]

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
            last_index=backends.moved(self.last_index, device),
            columns={name: backends.moved(x, device) for name, x in self.columns.items()},
            mismatched=None if self.mismatched is None else self.mismatched.to(device),
            statistics={name: backends.moved(x, device) for name, x in self.statistics.items()},
        )


def part_of(batch: PackedBatch, own: slice) -> PackedBatch:
    """The tokens `own` of a batch on the CPU, for a model whose attention sees all of them
    (`distributed.token_parts`): cu_seqlens, parents and max_seqlen stay those of the whole.

    Not of batches with columns, roles or mismatched examples.
    """
    inside = (batch.target_index >= own.start) & (batch.target_index < own.stop)
    counts = [int(targets.sum()) for targets in inside.split(batch.target_counts)]
    return replace(
        batch,
        input_ids=batch.input_ids[own],
        position_ids=batch.position_ids[own],
        target_index=batch.target_index[inside] - own.start,
        target_ids=batch.target_ids[inside],
        target_counts=tuple(counts),
    )


def collate(examples: Sequence[Example], *, share_prefixes: bool = False) -> PackedBatch:
    """Pack `examples` into one batch on the CPU.

    In their order, each before its `others`, which are examples of the batch like it; those that
    are mismatched make a batch of their own. With `share_prefixes` tokens that examples begin with
    in common are one sequence, which the rest of each continues, if the same adapter learns from
    them. The loss and its gradients are the same.

    Raises ValueError for no examples, or an empty one.
    """
    sequences = [sequence for example in examples for sequence in example.sequences]
    mismatched = [sequence for sequence in sequences if sequence.role == MISMATCHED]
    batch = _packed([s for s in sequences if s.role != MISMATCHED], share_prefixes)
    if not mismatched:
        return batch
    return replace(batch, mismatched=_packed(mismatched, share_prefixes))


def _packed(examples: Sequence[Example], share_prefixes: bool) -> PackedBatch:
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
        target_ids.append(_targets(example, ids[targets]))
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
        last_index=torch.tensor([int(places[-1]) for places in rows]),
        roles=tuple(e.role for e in examples) if any(e.role for e in examples) else (),
        columns={name: _column(name, examples) for name in _names(examples)},
    )


def _targets(
    example: Example,
    ids: np.ndarray,  # [targets]: the tokens that stand there
) -> np.ndarray:
    """[targets]: the tokens to learn."""
    instead = example.columns.get(TARGET)
    if instead is None:
        return ids
    learned = np.asarray(instead, dtype=np.int64)
    return np.where(learned >= 0, learned, ids)


def _names(examples: Iterable[Example]) -> dict[str, None]:
    return {name: None for example in examples for name in example.columns if name != TARGET}


def _column(name: str, examples: Sequence[Example]) -> Tensor:
    """[E] or [U] float32: the examples' numbers; 0 for an example that has none, but a weight is 1.

    WEIGHT is of each target always.
    """
    default = 1.0 if name in (WEIGHT, EXAMPLE_WEIGHT) else 0.0
    values = [example.columns.get(name, default) for example in examples]
    if name != WEIGHT and not any(isinstance(value, Sequence) for value in values):
        return torch.tensor(values, dtype=torch.float32)
    of_targets: list[float] = []
    for example, value in zip(examples, values, strict=True):
        each = value if isinstance(value, Sequence) else [value] * example.num_targets
        if len(each) != example.num_targets:
            raise ValueError(
                f"{example.origin}: column {name!r} has {len(each)} numbers for "
                f"{example.num_targets} targets"
            )
        of_targets += each
    return torch.tensor(of_targets, dtype=torch.float32)


def _rows(
    segments: Sequence[Segment], bounds: np.ndarray, lengths: Sequence[int]
) -> list[np.ndarray]:
    """Where in the batch each token of each example stands."""
    rows = [np.empty(length, dtype=np.int64) for length in lengths]
    for segment, begin, end in zip(segments, bounds[:-1], bounds[1:], strict=True):
        for member in segment.members:
            rows[member][segment.start : segment.end] = np.arange(begin, end)
    return rows


def without_shared_prefixes(batch: PackedBatch) -> PackedBatch:
    """The same examples, each a sequence of its own, for a model that cannot share their rows."""
    if batch.parents is None:
        return batch
    parents, bounds = batch.parents.tolist(), batch.cu_seqlens.tolist()
    rows, lengths, ends = [], [], []
    for last in batch.last_index.tolist():
        path = [bisect_right(bounds, last) - 1]
        ends.append(path[0])
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        spans = [torch.arange(bounds[part], bounds[part + 1]) for part in reversed(path)]
        rows += spans
        lengths.append(sum(map(len, spans)))
    device = batch.input_ids.device
    kept = torch.cat(rows).to(device)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    first = torch.repeat_interleave(starts[:-1], torch.tensor(batch.target_counts)).to(device)
    return replace(
        batch,
        input_ids=batch.input_ids[kept],
        position_ids=batch.position_ids[kept],
        cu_seqlens=starts.to(device, torch.int32),
        parents=None,
        target_index=first + batch.position_ids[batch.target_index],
        last_index=(starts[1:] - 1).to(device),
        adapters=tuple(batch.adapters[end] for end in ends) if batch.adapters else (),
    )
