"""Makes the shipped probe out of the documentation that comes with Python.

    python -m lora_engine.data.probe_source > lora_engine/data/probe.jsonl

Texts are paragraphs of the language reference (`pydoc_data.topics`). Questions are about built-in
exceptions, functions written in C and HTTP statuses, answered by their documentation; none of it
stands in a Python file, so that the training data `docstrings` do not hold the answers. The
documentation differs between versions of Python: the file is made once, so that the figures of
two machines are of the same texts. Its licence is `probe_licence.txt`.
"""

import builtins
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import TypeVar

_Value = TypeVar("_Value")

_TEXTS = 24
_QUESTIONS = 16  # of each kind
_LENGTHS = range(350, 650)  # characters of a text
_ANSWERS = range(20, 140)


def probe_records() -> Iterator[dict[str, str]]:
    """{"text": …}, then {"question": …, "answer": …}, in a fixed order."""
    yield from ({"text": text} for text in _spread(list(_paragraphs()), _TEXTS))
    for pairs in (_exceptions(), _functions(), _statuses()):
        answered = [(q, a) for q, a in pairs if len(a) in _ANSWERS]
        for question, answer in _spread(answered, _QUESTIONS):
            yield {"question": question, "answer": answer}


def _paragraphs() -> Iterator[str]:
    """Of each topic the first paragraph of prose that no topic before it has, as one line."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for _, topic in sorted(topics.items()):
        paragraphs = (" ".join(part.split()) for part in topic.split("\n\n") if part[:1] != " ")
        fitting = [text for text in paragraphs if len(text) in _LENGTHS and _is_prose(text)]
        if fitting and fitting[0] not in seen:
            seen.add(fitting[0])
            yield fitting[0]


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c in " ,." for c in text)
    return (
        text[:1].isupper() and text[-1] == "." and "::=" not in text and letters > 0.94 * len(text)
    )


def _exceptions() -> Iterator[tuple[str, str]]:
    for name, kind in sorted(vars(builtins).items()):
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__name__ == name:
            yield f"What does Python's exception {name} mean?", _first_line(kind)


def _functions() -> Iterator[tuple[str, str]]:
    for owner, prefix in ((math, "math."), (builtins, ""), (str, "str.")):
        for name, value in sorted(vars(owner).items()):
            if name[0] != "_" and (inspect.isbuiltin(value) or inspect.ismethoddescriptor(value)):
                yield f"What does Python's {prefix}{name} do?", _first_line(value)


def _statuses() -> Iterator[tuple[str, str]]:
    for status in HTTPStatus:
        yield f"What does HTTP status {status.value}, {status.phrase}, mean?", status.description


def _first_line(documented: object) -> str:
    """The first sentence of a docstring, if it is a line; else nothing."""
    line = (inspect.getdoc(documented) or "").partition("\n")[0].strip()
    return line if line.endswith(".") else ""


def _spread(values: Sequence[_Value], count: int) -> list[_Value]:
    """`count` of the values, evenly spaced."""
    return [values[i * len(values) // count] for i in range(count)]


if __name__ == "__main__":
    for record in probe_records():
        print(json.dumps(record, ensure_ascii=False))
