"""Preferences that ship with every Python: docstrings of the standard library, and worse ones.

The better answer to a question of `docstrings` is the docstring that the function has. The worse
one is, in turn, the same said in more words, which tell nothing more, and the docstring of another
function.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_engine.data.docstrings import docstring_records
from lora_engine.data.records import Record

WORDY = (
    "This function is a Python function that is used to {said}. It takes the given input, "
    "performs the necessary operations and returns the result."
)


def docstring_pairs(root: Path | None = None) -> list[Record]:
    """One "preference" record per function, in the order of `docstring_records(root)`."""
    return [
        replace(
            record,
            kind="preference",
            messages=(),
            prompt=record.messages[:-1],
            chosen=record.messages[-1:],
            rejected=({"role": "assistant", "content": worse},),
        )
        for record, worse in _with_worse(root)
    ]


def docstring_labels(root: Path | None = None) -> list[Record]:
    """One "unpaired" record per function: every other one has the worse docstring."""
    judged = []
    for place, (record, worse) in enumerate(_with_worse(root)):
        is_good = place // 2 % 2 == 0  # each kind of worse answer in turn
        answer = record.messages[-1:] if is_good else ({"role": "assistant", "content": worse},)
        judged.append(
            replace(
                record,
                kind="unpaired",
                messages=(),
                prompt=record.messages[:-1],
                completion=answer,
                label=is_good,
            )
        )
    return judged


def _with_worse(root: Path | None) -> Iterator[tuple[Record, str]]:
    """Each record of a docstring, and a worse answer to the same question."""
    records = docstring_records(root)
    answers = [str(record.messages[-1]["content"]) for record in records]
    for place, (record, answer) in enumerate(zip(records, answers, strict=True)):
        if place % 2 == 0:
            said = answer.rstrip(".")
            yield record, WORDY.format(said=said[:1].lower() + said[1:])
        else:  # of a function far away, of another module as a rule
            yield record, answers[(place + len(answers) // 2) % len(answers)]
