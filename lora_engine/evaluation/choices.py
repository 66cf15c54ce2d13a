"""Questions with choices: the one that the model finds likeliest is its answer.

The log-probability of a choice is that of all its tokens, with the one that ends an answer, given
the question. Long choices have more tokens to lose by, so what is divided by the choice's bytes is
told as well, which no tokenizer changes (Gao, "Multiple choice normalization in LM evaluation",
2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
from torch import nn

from lora_engine.data.dataset import prepare
from lora_engine.data.fields import kind_of, messages_of, string_of
from lora_engine.data.listing import raise_listed, without_origin
from lora_engine.data.readers import Row, RowError
from lora_engine.data.render import Example
from lora_engine.data.sources import BUILT_IN, open_source
from lora_engine.data.strings import check_string
from lora_engine.data.template import Message, Tokenizer
from lora_engine.errors import UserError
from lora_engine.evaluation.scores import interval, score_examples

Interval = dict[str, float]


@dataclass(frozen=True)
class Question:
    """asked: text, or messages. answer: the number of the right one of `choices`."""

    asked: str | tuple[Message, ...]
    choices: tuple[str, ...]
    answer: int
    origin: str


@dataclass(frozen=True)
class Choice:
    """What a model says to a question. nats: −log p of each choice. right, right_per_byte: 1 where
    the answer is the likeliest, of all and by byte, else 0; 1/n where it is one of n likeliest."""

    origin: str
    nats: tuple[float, ...]
    right: float
    right_per_byte: float


class ChoiceSummary(TypedDict):
    """Shares of the questions, each {"value", "low", "high"}."""

    questions: int
    accuracy: Interval
    accuracy_per_byte: Interval


def read_questions(source: str, *, limit: int | None = None) -> list[Question]:
    """Rows of `prompt`, `question` or `messages`, with `choices`, a list of texts, and `answer`.

    answer: one of the choices, or its number from 0, or its letter from A. Raises one UserError
    that lists every row that is none, and one for a source that cannot be read or has no rows.
    """
    if source in BUILT_IN:
        raise UserError(f"{source}: holds no questions with choices; give a file of them")
    name, rows = open_source(source, None)
    found: list[Question] = []
    problems: list[tuple[str, str]] = []
    for row in rows:
        if limit is not None and len(found) + len(problems) == limit:
            break
        if isinstance(row, RowError):
            problems.append((row.origin, row.problem))
            continue
        try:
            found.append(_question(row))
        except UserError as error:
            problems.append(without_origin(error, row.origin))
    raise_listed(name, problems, len(found) + len(problems))
    if not found:
        raise UserError(f"{name}: holds no records; give questions with choices")
    return found


def _question(row: Row) -> Question:
    value, origin = row.value, row.origin
    if not isinstance(value, dict):
        raise UserError(f"{origin}: expected an object, got {kind_of(value)}")
    asked: str | tuple[Message, ...]
    if value.get("messages") is not None:
        asked = messages_of(value["messages"], origin)
    else:
        field = "question" if value.get("prompt") is None else "prompt"
        if value.get(field) is None:
            raise UserError(f"{origin}: has no 'prompt', 'question' or 'messages'")
        asked = string_of(value, field, origin)
        if not asked.strip():
            raise UserError(f"{origin}: {field!r} is empty")
    choices = value.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"{origin}: 'choices' must be a list of two texts or more")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise UserError(f"{origin}: 'choices' must be texts that are not empty")
        check_string(choice, f"{origin}: 'choices'")
    if len(set(choices)) < len(choices):
        raise UserError(f"{origin}: two of the 'choices' are the same")
    return Question(
        asked=asked,
        choices=tuple(choices),
        answer=_answer(value.get("answer"), choices, origin),
        origin=origin,
    )


def _answer(value: object, choices: Sequence[str], origin: str) -> int:
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    if isinstance(value, str) and len(value) == 1 and value in letters:
        return letters.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise UserError(
        f"{origin}: 'answer' must be one of the choices, its number from 0 or its letter from A"
    )


def choice_examples(questions: Sequence[Question], tokenizer: Tokenizer) -> list[Example]:
    """Every choice of every question, one after the other; its tokens are the supervised ones.

    A space stands between a question of text and its choice where neither has one. Raises UserError
    where a choice cannot be tokenised.
    """
    rows = [_row(question, choice) for question in questions for choice in question.choices]
    examples = prepare(rows, tokenizer, max_length=None, loss_on="last_assistant")
    if len(examples) < len(rows):
        raise UserError(f"a choice has nothing to measure: {examples.dropped[0].reason}")
    named, rest = [], iter(examples)
    for question in questions:
        own = [replace(next(rest), origin=question.origin) for _ in question.choices]
        if len({tuple(one.input_ids) for one in own}) < len(own):
            raise UserError(
                f"{question.origin}: two of the 'choices' are the same in the model's tokens"
            )
        named += own
    return named


def _row(question: Question, choice: str) -> dict[str, object]:
    asked = question.asked
    if not isinstance(asked, str):
        return {"messages": [*asked, {"role": "assistant", "content": choice}]}
    space = "" if asked[-1].isspace() or choice[0].isspace() else " "
    return {"prompt": asked, "completion": space + choice}


def score_choices(
    model: nn.Module, questions: Sequence[Question], examples: Sequence[Example]
) -> list[Choice]:
    """What the model says to each question; examples: of `choice_examples`."""
    nats = iter([score.nats for score in score_examples(model, examples)])
    found = []
    for question in questions:
        own = [next(nats) for _ in question.choices]
        sizes = [len(choice.encode()) for choice in question.choices]
        per_byte = [loss / size for loss, size in zip(own, sizes, strict=True)]
        found.append(
            Choice(
                origin=question.origin,
                nats=tuple(own),
                right=_share(own, question.answer),
                right_per_byte=_share(per_byte, question.answer),
            )
        )
    return found


def _share(losses: Sequence[float], answer: int) -> float:
    """The first of equal ones would make an answer of a model that has none."""
    least = min(losses)
    return (losses[answer] == least) / losses.count(least)


def summarise_choices(choices: Sequence[Choice]) -> ChoiceSummary:
    ones = np.ones(len(choices))
    return {
        "questions": len(choices),
        "accuracy": interval(np.array([c.right for c in choices], dtype=np.float64), ones),
        "accuracy_per_byte": interval(
            np.array([c.right_per_byte for c in choices], dtype=np.float64), ones
        ),
    }


def choices_by_group(choices: Sequence[Choice], groups: Sequence[str]) -> dict[str, ChoiceSummary]:
    """The summary of each group; groups: of each question."""
    members: dict[str, list[Choice]] = {}
    for choice, group in zip(choices, groups, strict=True):
        members.setdefault(group, []).append(choice)
    return {name: summarise_choices(part) for name, part in members.items()}


def choice_difference(choices: Sequence[Choice], others: Sequence[Choice]) -> Interval:
    """The accuracy of `choices` minus that of `others`, the same questions drawn of both."""
    gained = [a.right - b.right for a, b in zip(choices, others, strict=True)]
    return interval(np.array(gained), np.ones(len(gained)))
