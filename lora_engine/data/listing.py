"""Many findings as a few lines: the same text once, with its count and its first places."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_engine.errors import UserError

PLACES = 3  # places named per finding; the count is always complete
LINES = 20  # listed in one error


@dataclass(frozen=True)
class Finding:
    """The same thing found in `count` records; `origins`: where the first few of them stand."""

    text: str
    count: int
    origins: tuple[str, ...]

    def places(self) -> str:
        """'a.jsonl:2, a.jsonl:5, a.jsonl:9 and 383 more'."""
        more = self.count - len(self.origins)
        return ", ".join(self.origins) + (f" and {more:,} more" if more else "")


def group(pairs: Iterable[tuple[str, str]]) -> tuple[Finding, ...]:
    """(origin, text) pairs by their text, in the order of first appearance."""
    places: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for origin, text in pairs:
        counts[text] = counts.get(text, 0) + 1
        if counts[text] <= PLACES:
            places.setdefault(text, []).append(origin)
    return tuple(Finding(text, counts[text], tuple(places[text])) for text in places)


def raise_listed(name: str, problems: Sequence[tuple[str, str]], total: int) -> None:
    """One UserError about the (origin, problem) pairs, if there are any.

    What is wrong in more than PLACES records is told once, with its count and first places.
    """
    if not problems:
        return
    frequent = {finding.text: finding for finding in group(problems) if finding.count > PLACES}
    listed = list(dict.fromkeys(_line(*problem, frequent) for problem in problems))
    if len(listed) > LINES:
        listed[LINES:] = [f"and {len(listed) - LINES:,} other problems"]
    start = f"{name}: {len(problems):,} of {total:,} records cannot be used, mend or remove them:"
    raise UserError(f"{start} {listed[0]}" if len(listed) == 1 else "\n  ".join([start, *listed]))


def _line(origin: str, problem: str, frequent: dict[str, Finding]) -> str:
    places = frequent[problem].places() if problem in frequent else origin
    return f"{places}: {problem}"


def without_origin(error: UserError, origin: str) -> tuple[str, str]:
    """(origin, what is wrong) of an error whose message begins with the origin."""
    return origin, str(error).removeprefix(f"{origin}: ")
