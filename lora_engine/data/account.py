"""What became of a dataset's records: what was dropped, cut, left out or read otherwise.

`account` gathers it as plain values, the form that summary.json holds; `lines` says the same to
people, and nothing where there is nothing to say.
"""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.listing import Finding, group

FIELDS = 20  # how many of the fields that nothing reads are named
DUPLICATE = "repeats an earlier example (kept)"
_DROPPED = "dropped, "  # begins what is said of records that are not learned from


class FoundRecords(TypedDict):
    """A `listing.Finding` as JSON has it."""

    text: str
    count: int
    origins: Sequence[str]


class Account(TypedDict):
    """What became of the records of the dataset `name`.

    ignored: how many records have each field, or key of messages, that nothing reads.
    """

    name: str
    records: int
    examples: int
    findings: list[FoundRecords]
    ignored: dict[str, int]


def findings(dataset: TokenizedDataset) -> tuple[Finding, ...]:
    """What happened to records of `dataset`, each kind once with its count."""
    return group(
        [
            *((dropped.origin, f"{_DROPPED}{dropped.reason}") for dropped in dataset.dropped),
            *((origin, "truncated to max_length") for origin in dataset.truncated),
            *((duplicate.origin, DUPLICATE) for duplicate in dataset.duplicates),
            *((example.origin, note) for example in dataset for note in example.notes),
        ]
    )


def account(dataset: TokenizedDataset) -> Account:
    """The account of `dataset`, as JSON can hold it."""
    return {
        "name": dataset.name,
        "records": dataset.num_records,
        "examples": len(dataset),
        "findings": [
            {"text": found.text, "count": found.count, "origins": found.origins}
            for found in findings(dataset)
        ],
        "ignored": dict(dataset.ignored),
    }


def lines(accounts: Iterable[Account]) -> list[str]:
    """The accounts that tell of something, as lines of text."""
    said: list[str] = []
    for about in accounts:
        findings = finding_lines(about)
        if findings:
            said += [f"{about['name']}: {learned_line(about)}", *(f"  {line}" for line in findings)]
    return said


def learned_line(about: Account) -> str:
    """How many records are learned from, and the number of examples where that is another."""
    dropped = sum(f["count"] for f in about["findings"] if f["text"].startswith(_DROPPED))
    learned, examples = about["records"] - dropped, about["examples"]
    made = f", as {examples:,} examples" if examples != learned else ""
    return f"{learned:,} of {about['records']:,} records are learned from{made}"


def finding_lines(about: Account) -> list[str]:
    """One line for each finding of an account, and one for all fields that nothing reads."""
    said = told_of_records(about["findings"])
    return said + ([ignored_line(about["ignored"].items())] if about["ignored"] else [])


def told_of_records(findings: Iterable[FoundRecords]) -> list[str]:
    """'dropped, the completion is empty: 2 (a.jsonl:1, a.jsonl:7)', a line for each finding."""
    found = [Finding(f["text"], f["count"], tuple(f["origins"])) for f in findings]
    return [f"{finding.text}: {finding.count:,} ({finding.places()})" for finding in found]


def ignored_line(ignored: Iterable[tuple[str, int]]) -> str:
    """'not read: weight (60), label (60)'."""
    fields = [f"{field} ({count:,})" for field, count in ignored]
    more = f" and {len(fields) - FIELDS:,} other fields" if len(fields) > FIELDS else ""
    return f"not read: {', '.join(fields[:FIELDS])}{more}"
