"""Which records are held out: by their contents and a seed, not by their order."""

import hashlib
from collections.abc import Sequence

from lora_engine.errors import UserError


def choose_heldout(
    contents: Sequence[str], groups: Sequence[str], fraction: float, *, seed: int = 0
) -> list[int]:
    """The numbers of about `fraction` of the records, in an order of which the first few are a fair
    sample.

    contents: a digest of each record's content. groups: records of one group, and of one content,
    stay on one side; "" is no group. Raises UserError where nothing would be held out, or all.
    """
    if not 0 < fraction < 1:
        raise UserError(f"held-out fraction must lie between 0 and 1, got {fraction}")
    keys = _side_keys(contents, groups)
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    target, taken = max(1, round(fraction * len(contents))), 0
    heldout_keys: set[str] = set()
    for key in sorted(sizes, key=lambda key: digest(seed, key)):
        if taken + sizes[key] <= target:
            heldout_keys.add(key)
            taken += sizes[key]
    if not heldout_keys or len(heldout_keys) == len(sizes):
        raise UserError(
            f"cannot hold out {fraction:.0%} of the records ({len(contents)}, or {len(sizes)} "
            "where those of the same content or group count as one); give another fraction, more "
            "records or an eval file"
        )
    return sorted(
        (i for i, key in enumerate(keys) if key in heldout_keys),
        key=lambda i: (digest(seed, contents[i]), i),
    )


def digest(seed: int, key: str) -> str:
    """What orders keys by chance, the same for the same seed."""
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def _side_keys(contents: Sequence[str], groups: Sequence[str]) -> list[str]:
    """The key by which each record is assigned to a side.

    A record without a group goes by its content. A content that appears in several groups would
    tie them together, so it goes with the first of them.
    """
    first_group: dict[str, str] = {}
    for content, group in zip(contents, groups, strict=True):
        first_group.setdefault(content, group)
    return [first_group[content] or content for content in contents]
