"""What a tuning journal says, line by line of the launch table. Needs nothing but Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.text_table import table
from benchmarks.gpu.tune_search import Decision, Measured, Parameters, decide

Key = tuple[str, str, str, int | None]


@dataclass(frozen=True)
class Outcome:
    """A line that was measured at all of its sizes, and what becomes of it."""

    key: Key
    present: Parameters
    measured: tuple[Measured, ...]
    decision: Decision


def decisions(journal: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """One for each line that was ended. A line that was begun again has its last results."""
    rows: dict[Key, list[Measured]] = {}
    outcomes: dict[Key, Outcome] = {}
    for line in journal:
        if line["event"] not in ("start", "row", "end"):
            continue
        kernel, capability_key, dtype, limit = line["item"]["line"]
        key: Key = (kernel, capability_key, dtype, limit)
        if line["event"] == "start":
            rows[key] = []
        elif line["event"] == "row":
            candidates = tuple((dict(p), float(s)) for p, s in line["candidates"])
            rows[key].append(
                Measured(line["case"], line["before"], line["again"], candidates, line["ceiling"])
            )
        else:
            measured = tuple(rows[key])
            present = line["item"]["present"]
            outcomes[key] = Outcome(key, present, measured, decide(measured))
    return list(outcomes.values())


def capability(journal: Sequence[Mapping[str, Any]]) -> int:
    """Of the GPU that was measured. Raises ValueError unless it is one, and a GPU."""
    contexts = [line for line in journal if line["event"] == "context"]
    found = {line["capability"] for line in contexts}
    if len(found) != 1 or any(line["device"] != "cuda" for line in contexts):
        raise ValueError(f"the journal is not of one kind of GPU: {sorted(found)}")
    (one,) = found
    return int(one)


def render(journal: Sequence[Mapping[str, Any]]) -> str:
    """The journal as Markdown: sizes before and after, and what became of each line."""
    outcomes = decisions(journal)
    sizes = [row for outcome in outcomes for row in _sizes(outcome)]
    changes = [_change(outcome) for outcome in outcomes]
    columns = ("kernel", "size", "before µs", "after µs", "gain", "of ceiling")
    lines = ("kernel", "dtype", "up to", "present", "tuned", "gain", "margin")
    parts = [
        "# Launch parameters, tuned",
        _context(journal),
        f"{len(outcomes)} lines measured, "
        f"{sum(o.decision.after is not None for o in outcomes)} changed.",
        table(lines, changes, left=5),
        table(columns, sizes, left=2),
        _others(journal),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sizes(outcome: Outcome) -> list[list[str]]:
    rows = []
    for measured in outcome.measured:
        before, after = measured.present(), measured.present()
        if outcome.decision.after is not None:
            after = measured.seconds(outcome.decision.after) or before
        case = measured.case
        sizes = " ".join(f"{name}={value}" for name, value in case["sizes"].items())
        rows.append(
            [
                case["kernel"],
                f"{case['dtype']} {sizes}",
                f"{before * 1e6:.1f}",
                f"{after * 1e6:.1f}",
                f"{before / after - 1:+.1%}",
                f"{measured.ceiling / after:.0%}",
            ]
        )
    return rows


def _change(outcome: Outcome) -> list[str]:
    kernel, _, dtype, limit = outcome.key
    decision = outcome.decision
    return [
        kernel,
        dtype,
        "any" if limit is None else str(limit),
        _parameters(outcome.present),
        "stays" if decision.after is None else _parameters(decision.after),
        f"{decision.gain - 1:+.1%}",
        f"{decision.margin:.1%}",
    ]


def _parameters(parameters: Parameters) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())


def _context(journal: Sequence[Mapping[str, Any]]) -> str:
    contexts = [line for line in journal if line["event"] == "context"]
    lines = [f"- `{x['command']}`, {x['date']}, {x['hardware']['GPU']}" for x in contexts]
    return "\n".join(lines)


def _others(journal: Sequence[Mapping[str, Any]]) -> str:
    """How many candidates were left out, and lines that failed."""
    rejected = [line for line in journal if line["event"] == "rejected"]
    wrong = [line for line in rejected if "case" in line]
    lines = [
        f"{len(rejected) - len(wrong)} candidates did not compile without faults, "
        f"{len(wrong)} did not give the present results."
    ]
    lines += [f"- {x['item']['line'][0]} {x['parameters']}: {x['message']}" for x in wrong]
    failed = [line for line in journal if line["event"] == "failure"]
    lines += [f"- {x['item']['line']}: {x['message']}" for x in failed]
    lines += [f"- {x['message']}" for x in journal if x["event"] == "note"]
    return "\n".join(lines)
