"""Two result files beside each other: what became slower, or takes more memory, beyond noise.

Times of two runs on one machine differ with whatever else it does. Where both runs measured the
ceiling of a row in turn with it, times are therefore compared in units of that ceiling. What a
median may move by chance is taken from the quartiles, 1.57 times their distance over the root of
the number of samples (McGill, Tukey, Larsen 1978), of both runs together; LEAST_CHANGE at least.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.common import results
from benchmarks.common.results import Key, Row
from benchmarks.common.text_table import table
from lora_engine.errors import UserError

LEAST_CHANGE = 0.05
LEAST_BYTES = 2**20  # of a kernel's memory, what an allocator may take more


@dataclass(frozen=True)
class Change:
    """before, after: seconds, or bytes where `what` is "memory". ratio: of the after to the before;
    above 1 is worse. noise: how far from 1 it may be by chance."""

    key: Key
    what: str
    before: float
    after: float
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        """ "worse", "better" or "same"."""
        if self.ratio > 1 + self.noise:
            return "worse"
        return "better" if self.ratio < 1 / (1 + self.noise) else "same"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Time and memory of every row that both results have."""
    rows = {results.key_of(row): row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        key = results.key_of(row)
        if key in rows:
            found.append(_time(key, rows[key], row))
            found += _memory(key, rows[key], row)
    return found


def _time(key: Key, before: Row, after: Row) -> Change:
    first, second = before["seconds"]["median"], after["seconds"]["median"]
    ratio = second / first
    if before.get("ceiling") and after.get("ceiling"):
        ratio *= after["ceiling"] / before["ceiling"]
    noise = max(LEAST_CHANGE, math.hypot(_noise(before["seconds"]), _noise(after["seconds"])))
    return Change(key, "time", first, second, ratio, noise)


def _noise(seconds: Mapping[str, float]) -> float:
    """How far a median may be from another of the same, relative."""
    if "upper" in seconds:
        spread = 1.57 * (seconds["upper"] - seconds["lower"]) / math.sqrt(seconds["samples"])
    else:
        spread = (seconds["slowest"] - seconds["fastest"]) / 2
    return float(spread / seconds["median"])


def _memory(key: Key, before: Row, after: Row) -> list[Change]:
    for name in ("peak_bytes", "extra_bytes"):
        if name in before and name in after:
            first, second = before[name], after[name]
            if abs(second - first) < LEAST_BYTES:
                return [Change(key, "memory", first, second, 1.0, LEAST_CHANGE)]
            ratio = second / max(first, LEAST_BYTES)
            return [Change(key, "memory", first, second, ratio, LEAST_CHANGE)]
    return []


def regressions(found: list[Change]) -> list[Change]:
    """What became worse of ours: peers are not ours to mend."""
    return [x for x in found if x.verdict == "worse" and x.key[-1].partition("-")[0] == "ours"]


def render(before: Mapping[str, Any], after: Mapping[str, Any], found: list[Change]) -> str:
    """What changed, and what it was measured on."""
    parts = [
        f"A: {results.machine(before)}, {before['date'][:10]}, load {before['load_average']:.1f}\n"
        f"B: {results.machine(after)}, {after['date'][:10]}, load {after['load_average']:.1f}"
    ]
    if results.machine(before) != results.machine(after):
        parts.append("The machines differ: only times in units of a measured ceiling compare.")
    elif results.is_busy(before) or results.is_busy(after):
        parts.append("Other programs ran beside: small changes may be theirs.")
    told = [x for x in found if x.verdict != "same"]
    if told:
        columns = ("case", "size", "pass", "implementation", "what", "A", "B", "B / A", "noise", "")
        parts.append(
            table(columns, [_line(x) for x in sorted(told, key=lambda x: -x.ratio)], left=5)
        )
    keys = [{results.key_of(row) for row in run["rows"]} for run in (before, after)]
    counts = f"{len(keys[0] & keys[1])} measurements in both"
    for name, mine, other in (("A", keys[0], keys[1]), ("B", keys[1], keys[0])):
        if mine - other:
            counts += f", {len(mine - other)} only in {name}"
    worse = len(regressions(found))
    verdict = f"{worse} of ours became worse" if worse else "none of ours became worse"
    parts.append(f"{counts}; beyond noise {verdict}.")
    return "\n\n".join(parts)


def _line(x: Change) -> list[str]:
    case, size, dtype, what, implementation = x.key
    values = [_text(x.what, value) for value in (x.before, x.after)]
    shown = [case, f"{size} {dtype}", what, implementation, x.what, *values]
    return [*shown, f"{x.ratio:.2f}", f"{x.noise:.0%}", x.verdict]


def _text(what: str, value: float) -> str:
    if what == "memory":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e6:.0f} µs"


def compare(first: str, second: str, show: Callable[[str], None] = print) -> int:
    """Shows what changed from one result file to the other; 1 if something of ours became worse.

    UserError for a file that has no results, or where nothing is measured in both.
    """
    before, after = results.read(first), results.read(second)
    found = changes(before, after)
    if not found:
        raise UserError(f"{second}: measures nothing that {first} does; compare two of one area")
    show(render(before, after, found))
    return 1 if regressions(found) else 0
