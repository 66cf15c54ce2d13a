"""Two result files beside each other: what became slower, or takes more memory, beyond noise.

Times of two runs on one machine differ with whatever else it does. Where both runs measured the
ceiling of a row in turn with it, times are therefore compared in units of that ceiling. What a
median may move by chance is taken from the quartiles, 1.57 times their distance over the root of
the number of samples (McGill, Tukey, Larsen 1978), of both runs and of their ceilings together;
LEAST_CHANGE at least. Fewer than FEWEST samples say nothing of that: such times are not compared.
Beside busy programs a whole step is compared by its processor time, and a kernel's time, which has
none, is not where the run measured what others took: to share a core takes several times as long.
Rows of other settings are not
the same measurement, whatever they are called.
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
FEWEST = 3  # samples of a time
MOST_TOLD = 8  # of rows that are missing


@dataclass(frozen=True)
class Change:
    """what: "time", "CPU time" or "memory". before, after: seconds, or bytes.

    ratio: of the after to the before; above 1 is worse. noise: how far from 1 it may be by chance.
    """

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


@dataclass
class Compared:
    """changes: of every row that both results have. few: how many times are of too few samples.
    beside: how many were taken beside busy programs, and say nothing.
    settings: by case, in what the two differ, so that its rows are not compared."""

    changes: list[Change]
    few: int
    beside: int
    settings: dict[str, str]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Compared:
    """Time and memory of every row that both results have."""
    rows = {results.key_of(row): row for row in before["rows"]}
    found = Compared([], 0, 0, {})
    runs = (before, after)
    busy = any(map(results.is_busy, runs))
    disturbed = any("others_cores" in run and results.is_busy(run) for run in runs)
    for row in after["rows"]:
        key = results.key_of(row)
        if key not in rows:
            continue
        if other := results.other_settings(before, after, row["case"]):
            found.settings[row["case"]] = other
            continue
        if disturbed and "cpu_seconds" not in row:
            found.beside += 1
        elif (time := _time(key, rows[key], row, busy)) is None:
            found.few += 1
        else:
            found.changes.append(time)
        found.changes += _memory(key, rows[key], row)
    return found


def _time(key: Key, before: Row, after: Row, busy: bool) -> Change | None:
    by_cpu = busy and "cpu_seconds" in before and "cpu_seconds" in after
    kind = "cpu_seconds" if by_cpu else "seconds"
    first, second = before[kind], after[kind]
    if min(first.get("samples", FEWEST), second.get("samples", FEWEST)) < FEWEST:
        return None
    noises = [_noise(first), _noise(second)]
    ratio = second["median"] / first["median"]
    if before.get("ceiling") and after.get("ceiling") and not by_cpu:
        ratio *= after["ceiling"] / before["ceiling"]
        noises += [_noise(x["ceiling_seconds"]) for x in (before, after) if "ceiling_seconds" in x]
    noise = max(LEAST_CHANGE, math.hypot(*noises))
    what = "CPU time" if by_cpu else "time"
    return Change(key, what, first["median"], second["median"], ratio, noise)


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


def regressions(found: Compared) -> list[Change]:
    """What became worse of ours: peers are not ours to mend."""
    return [x for x in found.changes if x.verdict == "worse" and _is_ours(x.key)]


def _is_ours(key: Key) -> bool:
    return key[-1].partition("-")[0] == "ours"


def render(before: Mapping[str, Any], after: Mapping[str, Any], found: Compared) -> str:
    """What changed, and what it was measured on."""
    parts = [f"A: {_about(before)}\nB: {_about(after)}"]
    if results.machine(before) != results.machine(after):
        parts.append("The machines differ: only times in units of a measured ceiling compare.")
    elif results.is_busy(before) or results.is_busy(after):
        parts.append("Other programs ran beside: small changes may be theirs.")
    if versions := _versions(before, after):
        parts.append(f"Versions differ: {versions}.")
    told = [x for x in found.changes if x.verdict != "same"]
    if told:
        columns = ("case", "size", "pass", "implementation", "what", "A", "B", "B / A", "noise", "")
        parts.append(
            table(columns, [_line(x) for x in sorted(told, key=lambda x: -x.ratio)], left=5)
        )
    if failures := after.get("failures"):
        parts.append("\n".join(f"Wrong in B: {line}" for line in failures))
    parts += [f"{case}: not compared, {other}." for case, other in found.settings.items()]
    return "\n\n".join([*parts, _counts(before, after, found)])


def _about(run: Mapping[str, Any]) -> str:
    parts = [results.machine(run), run["date"][:10]]
    parts += [f"commit {run['commit']}"] if "commit" in run else []
    return ", ".join([*parts, results.load(run)])


def _versions(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Of what software both name another version."""
    first, second = before.get("software", {}), after.get("software", {})
    names = [name for name in first if name in second and first[name] != second[name]]
    return ", ".join(f"{name} {first[name]} and {second[name]}" for name in names)


def _counts(before: Mapping[str, Any], after: Mapping[str, Any], found: Compared) -> str:
    keys = [{results.key_of(row) for row in run["rows"]} for run in (before, after)]
    lines = [f"{len({x.key for x in found.changes})} measurements compared"]
    if found.few:
        lines.append(f"{found.few} times not, being of fewer than {FEWEST} samples")
    if found.beside:
        lines.append(f"{found.beside} times not, taken beside busy programs")
    for name, mine, other in (("A", keys[0], keys[1]), ("B", keys[1], keys[0])):
        if mine - other:
            lines.append(f"{len(mine - other)} only in {name}{_named(mine - other)}")
    worse = len(regressions(found))
    verdict = f"{worse} of ours became worse" if worse else "none of ours became worse"
    return f"{', '.join(lines)}; beyond noise {verdict}."


def _named(keys: set[Key]) -> str:
    """Those of ours, as far as they are few."""
    ours = sorted(" ".join(key) for key in keys if _is_ours(key))
    if not ours:
        return ""
    more = f", … {len(ours) - MOST_TOLD} more" if len(ours) > MOST_TOLD else ""
    return f" (of ours: {', '.join(ours[:MOST_TOLD])}{more})"


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
    """Shows what changed from one result file to the other; 1 if something of ours became worse,
    or was wrong in the second.

    UserError for a file that has no results, or where nothing is measured in both.
    """
    before, after = results.read(first), results.read(second)
    found = changes(before, after)
    if not (found.changes or found.few or found.beside) and not after.get("failures"):
        why = "; ".join(f"{case} has {other}" for case, other in found.settings.items())
        why = why or f"measures nothing that {first} does"
        raise UserError(f"{second}: {why}; compare two of one area, with the same settings")
    show(render(before, after, found))
    return 1 if regressions(found) or after.get("failures") else 0
