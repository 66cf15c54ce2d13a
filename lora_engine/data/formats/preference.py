"""Answers that are compared or judged: preference pairs, scored lists, single verdicts, prompts.

A prompt is a string or a list of messages, and so are the answers: what has a system message, tools
or a chat's turns is read as messages, two strings stay plain text.
"""

import math
from collections.abc import Mapping, Sequence

from lora_engine.data.fields import kind_of
from lora_engine.data.formats.base import (
    EVERY,
    FOR_TEMPLATES,
    Fields,
    Format,
    is_empty,
    text_field,
    truth,
)
from lora_engine.data.formats.chat import (
    LISTS,
    for_template,
    is_conversation,
    messages_of,
    with_system,
)
from lora_engine.data.formats.instructions import ALPACA, DOLLY, QUESTION_ANSWER, question
from lora_engine.data.formats.plain import refuse_system
from lora_engine.errors import UserError

VERDICTS = ("label", "kto_tag")
_LONGEST_LABEL = 30  # characters of one that a message repeats
_LISTED = ("completions", "responses")
_SCORES = ("scores", "ratings")
_SCORE_KEYS = ("overall_score", "score", "rating", "fine-grained_score")
_ANSWER_KEYS = ("response", "content", "text", "completion", "answer")
_ASKED = (*ALPACA[:2], *DOLLY[:2], *QUESTION_ANSWER[:2], "system", "history")
# Which may hold what is asked, beside two answers without a prompt.
_ASKS = ("input", "query", "problem", "user", "context", "history", "system", "system_prompt")
_FRAME = (*LISTS, "prompt", *_ASKED, *FOR_TEMPLATES)


def _prompt(row: Fields) -> object:
    """What is asked: a string, messages, or None where the answers hold it."""
    for field in LISTS:
        if is_conversation(row.get(field)):
            messages = messages_of(row[field], field)
            if messages[-1]["role"] != "assistant":  # else a whole conversation, as chosen is
                return with_system(row, messages)
    if "prompt" in row:
        if isinstance(row["prompt"], Mapping) and "replies" in row["prompt"]:
            raise UserError(
                "is a tree of messages and their 'replies'; make a record of each conversation "
                "that is to be learned, with 'messages' from the first to the answer"
            )
        if is_conversation(row["prompt"]):
            return with_system(row, messages_of(row["prompt"], "prompt"))
        refuse_system(row)
        return row["prompt"]
    for columns in (ALPACA, QUESTION_ANSWER):
        if columns[0] in row:
            about = "input" if "input" in row else "context"
            return question(row, (columns[0], about, ""))
    return None


def _answer(value: object, field: str) -> object:
    return messages_of(value, field) if is_conversation(value) else value


def _pair(row: Fields, chosen: object, rejected: object) -> dict[str, object]:
    prompt = _prompt(row)
    made = {"chosen": chosen, "rejected": rejected, **for_template(row)}
    if row.get("margin") is not None:
        made["margin"] = row["margin"]
    return made if prompt is None else {"prompt": prompt, **made}


def _read_preference(row: Fields) -> dict[str, object]:
    for field, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if field not in row:
            raise UserError(f"has {other!r}, but no {field!r} to compare it with")
    chosen, rejected = (_answer(row[field], field) for field in ("chosen", "rejected"))
    if isinstance(chosen, str) and _prompt(row) is None:
        _check_asked(row)
    return _pair(row, chosen, rejected)


def _check_asked(row: Fields) -> None:
    """Raises UserError where a field that is not read may hold what two texts answer."""
    others = [field for field, value in row.items() if is_conversation(value)]
    asks = [field for field in (*_ASKS, *others) if not is_empty(row.get(field))]
    if not asks:
        return
    columns = [f"prompt: {asks[0]}"]
    if "system" in row and asks != ["system"]:  # it may be filled in other rows
        columns = ["system: system", f"question: {next(name for name in asks if name != 'system')}"]
    raise UserError(
        f"compares two answers to a prompt that may be in {' and '.join(map(repr, asks))}; say so "
        f"with data.columns: {{{', '.join([*columns, 'chosen: chosen', 'rejected: rejected'])}}}"
    )


def _read_openai(row: Fields) -> dict[str, object]:
    asked = row["input"]
    if not isinstance(asked, Mapping) or not is_conversation(asked.get("messages")):
        raise UserError("'input' must be an object with 'messages'")
    chosen, rejected = (
        messages_of(row[field], field) for field in ("preferred_output", "non_preferred_output")
    )
    prompt = messages_of(asked["messages"], "messages")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **for_template(asked)}


def _read_scored(row: Fields) -> dict[str, object]:
    """The best against the worst of a list of answers; the first of those that are equal."""
    field = next(name for name in _LISTED if name in row)
    answers = row[field]
    assert isinstance(answers, list | tuple)
    scores = _scores(row, answers)
    best = max(range(len(answers)), key=lambda i: (scores[i], -i))
    worst = min(range(len(answers)), key=lambda i: (scores[i], i))
    if scores[best] == scores[worst]:
        return {"drop": "all its answers have the same score"}
    chosen, rejected = (_answer_text(answers[i], field) for i in (best, worst))
    return _pair(row, chosen, rejected)


def _scores(row: Fields, answers: Sequence[object]) -> list[float]:
    given = next((row[name] for name in _SCORES if name in row), None)
    if given is None:
        given = [_score_of(answer) for answer in answers]
    if not isinstance(given, list | tuple) or len(given) != len(answers):
        raise UserError(f"needs a score for each of its {len(answers)} answers")
    scores = []
    for score in given:
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not math.isfinite(score)
        ):
            what = repr(score) if isinstance(score, float) else kind_of(score)
            raise UserError(f"has a score that is no number but {what}")
        scores.append(float(score))
    return scores


def _score_of(answer: object) -> object:
    if isinstance(answer, Mapping):
        for key in _SCORE_KEYS:
            if answer.get(key) is not None:
                return answer[key]
    return None


def _answer_text(answer: object, field: str) -> object:
    if isinstance(answer, Mapping):
        answer = next((answer[key] for key in _ANSWER_KEYS if answer.get(key) is not None), None)
    if not isinstance(answer, str):
        raise UserError(f"{field!r} must hold answers that are strings, got {kind_of(answer)}")
    return answer


def _is_scored(row: Fields) -> bool:
    """A prompt and a list of at least two answers with scores, beside or inside them."""
    answers = next((row[name] for name in _LISTED if name in row), None)
    if not isinstance(answers, list | tuple) or len(answers) < 2:
        return False
    asked = any(field in row for field in ("prompt", "instruction", "question"))
    has_scores = any(name in row for name in _SCORES)
    return asked and (has_scores or any(_score_of(answer) is not None for answer in answers))


def _verdict(row: Fields) -> str | None:
    """The field that says whether the answer is a good one."""
    return next((field for field in VERDICTS if not is_empty(row.get(field))), None)


def _judged(row: Fields) -> tuple[object, object] | None:
    """The prompt and the one answer of a row; None if it has none."""
    if "completion" in row and "prompt" in row:
        return _prompt(row), _answer(row["completion"], "completion")
    for field in LISTS:
        if is_conversation(row.get(field)):
            messages = messages_of(row[field], field)
            return with_system(row, messages[:-1]), messages[-1:]
    for columns in (ALPACA, DOLLY, QUESTION_ANSWER):
        if columns[0] in row and columns[2] in row:
            return question(row, columns), text_field(row, columns[2])
    return None


def _is_judged(row: Fields) -> bool:
    if _verdict(row) is None:
        return False
    both = [("prompt", "completion"), *((asked, told) for asked, _, told in _QUESTIONS)]
    return any(a in row and b in row for a, b in both) or any(
        is_conversation(row.get(field)) for field in LISTS
    )


_QUESTIONS = (ALPACA, DOLLY, QUESTION_ANSWER)


def _read_judged(row: Fields) -> dict[str, object]:
    verdict, judged = _verdict(row), _judged(row)
    if verdict is None or judged is None:
        raise UserError("needs a prompt, one answer and a 'label' that is true or false")
    prompt, completion = judged
    label = truth(row[verdict])
    if label is None:
        value = repr(row[verdict])
        given = value if len(value) <= _LONGEST_LABEL else kind_of(row[verdict])
        raise UserError(
            f"{verdict!r} must say whether the answer is a good one (true or false, 1 or 0, yes or "
            f"no), got {given}; if it says something else, say what the record is with data.format"
        )
    return {"prompt": prompt, "completion": completion, "label": label, **for_template(row)}


def _read_prompt(row: Fields) -> dict[str, object]:
    beside = {field: value for field, value in row.items() if field != "system"}
    return {**beside, "prompt": _prompt(row), **for_template(row)}


PREFERENCE = Format(
    "preference",
    needs="'chosen' and 'rejected'",
    fits=lambda row: "chosen" in row or "rejected" in row,
    read=_read_preference,
    fields=("chosen", "rejected", "margin", *_FRAME),
    over=("prompts", "messages", "sharegpt"),
)
OPENAI = Format(
    "openai-preference",
    needs="'input', 'preferred_output' and 'non_preferred_output'",
    fits=lambda row: "preferred_output" in row and "non_preferred_output" in row,
    read=_read_openai,
    fields=("input", "preferred_output", "non_preferred_output"),
)
SCORED = Format(
    "scored",
    needs="'prompt' and scored 'completions'",
    fits=_is_scored,
    read=_read_scored,
    fields=(*_LISTED, *_SCORES, *_FRAME),
    over=("prompts",),
)
UNPAIRED = Format(
    "unpaired",
    needs="an answer and a 'label' of true or false",
    fits=_is_judged,
    read=_read_judged,
    fields=("completion", "output", "response", "answer", *VERDICTS, *_FRAME),
    over=(
        "prompt-completion",
        "prompts",
        "messages",
        "sharegpt",
        "alpaca",
        "dolly",
        "question-answer",
    ),
)
PROMPTS = Format(
    "prompts",
    needs="'prompt'",
    fits=lambda row: not is_empty(row.get("prompt")),
    read=_read_prompt,
    fields=EVERY,
)
FORMATS = (PREFERENCE, OPENAI, SCORED, UNPAIRED, PROMPTS)
