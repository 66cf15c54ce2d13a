"""What the examples of a batch begin with in common, as a tree of segments."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# A shorter common beginning is not shared: attention works a whole tile of queries for every
# sequence, so that a sequence of a few tokens would cost more than it saves.
MIN_SHARED = 8


class Segment(NamedTuple):
    """Tokens `start` to `end` of every example in `members`, which are the same in all of them.

    parent: the segment with the tokens before `start`, by its place in the list; -1: none.
    """

    members: tuple[int, ...]
    start: int
    end: int
    parent: int


def whole_segments(tokens: Sequence[np.ndarray]) -> list[Segment]:
    """Every example as one segment."""
    return [Segment(members=(i,), start=0, end=len(ids), parent=-1) for i, ids in enumerate(tokens)]


def shared_segments(
    tokens: Sequence[np.ndarray],  # each [length] int64
    min_shared: int = MIN_SHARED,
    kinds: Sequence[str] | None = None,
) -> list[Segment]:
    """The segments of examples, those of a common beginning shared; parents before children.

    A segment of several members has at least `min_shared` tokens. Only examples of one kind share,
    where `kinds` gives each its own.
    """
    segments: list[Segment] = []
    alike: dict[str, list[int]] = {}
    for member in range(len(tokens)):
        alike.setdefault("" if kinds is None else kinds[member], []).append(member)
    # A group is (members, start, seen, parent): all its members have the same tokens before `seen`;
    # those before `start` are already in the segment `parent` and its parents.
    groups = [(tuple(members), 0, 0, -1) for members in reversed(alike.values())]
    while groups:
        members, start, seen, parent = groups.pop()
        end = common_length(tokens, members, seen)
        alone = len(members) == 1
        if end > start and (alone or end - start >= min_shared):
            segments.append(Segment(members=members, start=start, end=end, parent=parent))
            start, parent = end, len(segments) - 1
        if not alone:
            parts = _split(tokens, members, end)
            groups.extend((part, start, end, parent) for part in reversed(parts))
    return segments


def common_length(tokens: Sequence[np.ndarray], members: Sequence[int], seen: int = 0) -> int:
    """How many tokens all members begin with in common, of which `seen` are known."""
    first = tokens[members[0]]
    end = len(first)
    for member in members[1:]:
        other = tokens[member][:end]
        differs = np.flatnonzero(first[seen : len(other)] != other[seen:])
        end = seen + int(differs[0]) if differs.size else len(other)
    return end


def _split(
    tokens: Sequence[np.ndarray], members: Sequence[int], place: int
) -> list[tuple[int, ...]]:
    """The members by their token at `place`, in the order of first appearance.

    A member that ends there is a part of its own.
    """
    parts: dict[int, list[int]] = {}
    for member in members:
        ids = tokens[member]
        key = int(ids[place]) if place < len(ids) else -1 - member
        parts.setdefault(key, []).append(member)
    return [tuple(part) for part in parts.values()]
