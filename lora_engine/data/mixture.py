"""Several sources in given shares of an epoch."""

from collections.abc import Sequence

import numpy as np


def mixed(
    sources: Sequence[np.ndarray],  # the examples of each, [n_i] int64
    weights: Sequence[float],
    *,
    seed: int = 0,
) -> list[np.ndarray]:
    """The examples of each source in an epoch of as many as all have together.

    A source's share is its weight over the sum of weights, at least one example. One that has too
    few is repeated, the rest of a repetition drawn by the seed; of one that has too many as many
    are drawn.
    """
    total = sum(map(len, sources))
    shares = np.asarray(weights, np.float64) / sum(weights)
    chosen = []
    for number, (examples, share) in enumerate(zip(sources, shares, strict=True)):
        chosen.append(drawn(examples, max(1, round(total * float(share))), [seed, number]))
    return chosen


def drawn(
    examples: np.ndarray,  # [n] int64
    count: int,
    seed: Sequence[int],
) -> np.ndarray:
    """`count` of the examples: each as often as all fit, and of the rest a draw by the seed."""
    whole, rest = divmod(count, max(1, len(examples)))
    some = np.random.default_rng(seed).permutation(len(examples))[:rest]
    return np.concatenate([np.tile(examples, whole), examples[np.sort(some)]])
