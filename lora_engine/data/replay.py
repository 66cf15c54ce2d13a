"""Examples of what a model is not to forget, mixed into those that it is to learn."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.mixture import drawn
from lora_engine.data.render import Example
from lora_engine.data.store import StoredExamples


def with_replay(
    train: TokenizedDataset, other: TokenizedDataset, fraction: float, *, seed: int = 0
) -> TokenizedDataset:
    """All of `train`, and so much of `other` that it is `fraction` of the examples, at least one.

    Which ones is decided by the seed; of fewer than that each is taken several times. Raises
    ValueError for a fraction that is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1")
    count = max(1, round(len(train) * fraction / (1 - fraction)))
    chosen = drawn(np.arange(len(other)), count, [seed, len(train)])
    own = train.mixture or ((train.name, len(train), len(train)),)
    return replace(
        train,
        examples=_both(train, other, chosen),
        kinds=_added(train.kinds, other.kinds),
        formats=_added(train.formats, other.formats),
        dropped=train.dropped + other.dropped,
        duplicates=train.duplicates + other.duplicates,
        ignored=_added(train.ignored, other.ignored),
        records=train.num_records + other.num_records,
        mixture=(*own, (other.name, len(other), count)),
    )


def _both(
    train: TokenizedDataset, other: TokenizedDataset, chosen: np.ndarray
) -> StoredExamples | list[Example]:
    """The examples of `train`, and the chosen ones of the other, which stay in their store where
    it is the same."""
    first, second = train.examples, other.examples
    if (
        isinstance(first, StoredExamples)
        and isinstance(second, StoredExamples)
        and first.store is second.store
    ):
        taken = second.taken(chosen)
        return StoredExamples(
            first.store,
            np.concatenate([first.examples, taken.examples]),
            np.concatenate([first.records, taken.records]),
        )
    return [*first, *(second[place] for place in chosen.tolist())]


def _added(*counts: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(dict(each))
    return tuple(sorted(total.items()))
