"""A question and its answer in columns: Alpaca, Dolly, question/answer, and the user's own.

Each becomes a chat of a question, with what it is about on the lines below, and an answer.
"""

from collections.abc import Sequence

from lora_engine.data.fields import kind_of
from lora_engine.data.formats.base import FOR_TEMPLATES, Fields, Format, joined, text_field
from lora_engine.data.formats.chat import for_template, with_system
from lora_engine.errors import UserError

REASONING = "reasoning_content"
_BESIDE = ("system", "history", REASONING, *FOR_TEMPLATES)
# question, what it is about, answer
ALPACA = ("instruction", "input", "output")
DOLLY = ("instruction", "context", "response")
QUESTION_ANSWER = ("question", "context", "answer")
TURN = ("user", "", "assistant")


def question(row: Fields, columns: Sequence[str]) -> list[Fields]:
    """The messages before the answer: system, earlier turns, the question with its matter."""
    asked, about, _ = columns
    said = joined(text_field(row, asked), text_field(row, about) if about else "")
    return with_system(row, [*_history(row), {"role": "user", "content": said}])


def answer(row: Fields, field: str) -> Fields:
    """The assistant's message in `field`."""
    made: dict[str, object] = {"role": "assistant", "content": text_field(row, field)}
    if reasoning := text_field(row, REASONING):
        made[REASONING] = reasoning
    return made


def _history(row: Fields) -> list[Fields]:
    """The earlier turns of `history`: pairs of a question and an answer."""
    pairs = row.get("history")
    if pairs is None:
        return []
    if not isinstance(pairs, list | tuple):
        raise UserError(f"'history' must be a list of pairs, got {kind_of(pairs)}")
    messages: list[Fields] = []
    for pair in pairs:
        texts = pair if isinstance(pair, list | tuple) else ()
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise UserError("'history' must hold pairs of a question and an answer, two strings")
        messages += [
            {"role": "user", "content": texts[0]},
            {"role": "assistant", "content": texts[1]},
        ]
    return messages


def _format(name: str, columns: tuple[str, str, str]) -> Format:
    asked, _, answered = columns

    def read(row: Fields) -> dict[str, object]:
        messages = [*question(row, columns), answer(row, answered)]
        return {"messages": messages, **for_template(row)}

    return Format(
        name,
        needs=f"{asked!r} and {answered!r}",
        fits=lambda row: asked in row and answered in row,
        read=read,
        fields=(*filter(None, columns), *_BESIDE),
    )


FORMATS = (
    _format("alpaca", ALPACA),
    _format("dolly", DOLLY),
    _format("question-answer", QUESTION_ANSWER),
    _format("turn", TURN),
)
