"""Examples that are nearly those of another data set, found by the pieces that they share.

The pieces of an example are its runs of SHINGLE tokens, hashed. Two examples that share most of
their pieces share, with high probability, some of the few pieces with the smallest hashes (Broder
1997); those that do are compared in full.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lora_engine.data.render import Example

SHINGLE = 5  # tokens
SKETCH = 8  # smallest hashes by which candidates are found
ALIKE = 0.7  # share of pieces in common, of all pieces of both (Jaccard)
_CANDIDATES = 50  # that are compared with one example
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class NearDuplicate:
    """An example, the one that it is like, and the share of pieces that both have."""

    origin: str
    other: str
    likeness: float


def near_duplicates(
    train: Iterable[Example], evaluation: Iterable[Example]
) -> tuple[NearDuplicate, ...]:
    """Evaluation examples that are like a training example of the same adapter, but not equal."""
    holders: dict[tuple[str, int], list[int]] = {}
    pieces: list[np.ndarray] = []
    known: list[tuple[str, list[int]]] = []
    for number, example in enumerate(train):
        hashes = _pieces(example.input_ids)
        pieces.append(hashes)
        known.append((example.origin, example.input_ids[:SHINGLE]))
        for value in hashes[:SKETCH].tolist():
            holders.setdefault((example.adapter, value), []).append(number)
    found = []
    for example in evaluation:
        hashes = _pieces(example.input_ids)
        candidates: dict[int, int] = {}
        for value in hashes[:SKETCH].tolist():
            for number in holders.get((example.adapter, value), ())[:_CANDIDATES]:
                candidates[number] = candidates.get(number, 0) + 1
        best, likeness = -1, 0.0
        for number in sorted(candidates, key=lambda n: -candidates[n])[:_CANDIDATES]:
            if (alike := _jaccard(hashes, pieces[number])) > likeness:
                best, likeness = number, alike
        if ALIKE <= likeness < 1:
            found.append(NearDuplicate(example.origin, known[best][0], round(likeness, 3)))
    return tuple(found)


def _pieces(tokens: list[int]) -> np.ndarray:
    """Distinct hashes of the example's pieces, ascending; of a short one a single piece."""
    ids = np.asarray(tokens, np.uint64)
    count = max(1, len(ids) - SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(min(SHINGLE, len(ids))):
            hashes = (hashes ^ ids[offset : offset + count]) * _MIX
            hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
