"""Rows that compare answers, judge one or hold none: preference, unpaired and prompt records."""

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, TypedDict

from lora_engine.data.fields import Messages, kind_of, messages_of, string_of
from lora_engine.data.strings import check_strings
from lora_engine.errors import UserError

# Plain text, or messages.
Said: TypeAlias = str | Messages

# What is read of a row with a prompt alone is a prompt only if it has none of these.
_OF_OTHER_KINDS = ("messages", "completion", "text", "chosen", "rejected")


class Fields(TypedDict, total=False):
    """Arguments of a Record."""

    prompt: Said
    completion: Said
    chosen: Said
    rejected: Said
    label: bool | None
    columns: Mapping[str, object]


class Parts(NamedTuple):
    """What a Record is made of. read: the row's fields that it is made from."""

    kind: Literal["preference", "unpaired", "prompt"]
    fields: Fields
    read: tuple[str, ...]


def is_preference(row: Mapping[str, object]) -> bool:
    """Whether the row is one for `preference_of`, going by the names of its fields."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return True
    if row.get("messages") is not None or row.get("prompt") is None:
        return False
    if row.get("completion") is not None:
        return isinstance(row.get("label"), bool)
    return not any(field in row for field in _OF_OTHER_KINDS)


def preference_of(row: Mapping[str, object], origin: str) -> Parts:
    """The record in a row. Raises UserError "origin: what is wrong"."""
    if row.get("chosen") is not None or row.get("rejected") is not None:
        return _preference(row, origin)
    prompt = _said(row, "prompt", origin)
    if row.get("completion") is None:
        columns = {name: value for name, value in row.items() if name not in ("prompt", "adapter")}
        check_strings(columns, f"{origin}: the columns")
        return Parts("prompt", {"prompt": prompt, "columns": columns}, ("prompt",))
    prompt, completion = _alike(prompt, _said(row, "completion", origin))
    return Parts(
        "unpaired",
        {"prompt": prompt, "completion": completion, "label": bool(row["label"])},
        ("prompt", "completion", "label"),
    )


def _preference(row: Mapping[str, object], origin: str) -> Parts:
    for field, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if row.get(field) is None:
            raise UserError(f"{origin}: has {other!r}, but no {field!r} to compare it with")
    read = ("prompt", "chosen", "rejected") if "prompt" in row else ("chosen", "rejected")
    chosen, rejected = _said(row, "chosen", origin), _said(row, "rejected", origin)
    prompt = None if row.get("prompt") is None else _said(row, "prompt", origin)
    if any(isinstance(part, tuple) for part in (prompt, chosen, rejected)):
        fields = _of_messages(prompt, _answer(chosen), _answer(rejected), origin)
    else:
        assert isinstance(chosen, str) and isinstance(rejected, str)
        fields = _of_texts(prompt if isinstance(prompt, str) else None, chosen, rejected, origin)
    if row.get("margin") is not None:
        margin = row["margin"]
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise UserError(f"{origin}: 'margin' must be a number, got {kind_of(margin)}")
        fields["columns"] = {"margin": float(margin)}
        read = (*read, "margin")
    return Parts("preference", fields, read)


def _of_texts(prompt: str | None, chosen: str, rejected: str, origin: str) -> Fields:
    if prompt is None:
        shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (characters are meant)
        # No word is cut in two, and a space before the answers belongs to them.
        prompt = shared[: max(shared.rfind(" "), shared.rfind("\n") + 1, 0)].rstrip(" ")
        if not prompt:
            raise UserError(
                f"{origin}: 'chosen' and 'rejected' begin with no words in common; give 'prompt'"
            )
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _of_messages(prompt: Said | None, chosen: Messages, rejected: Messages, origin: str) -> Fields:
    """The conversation before the answers, and what follows it in each.

    The answers may repeat the prompt; without one, it is what both begin with.
    """
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
    if prompt is not None and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        prompt = None
    asked = (message["role"] == "assistant" for message in (chosen[0], rejected[0]))
    if prompt is None or not all(asked):
        shared = 0
        longest = min(len(chosen), len(rejected)) - 1
        while shared < longest and chosen[shared] == rejected[shared]:
            shared += 1
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        said = [message.get("content") for message in before]
        if prompt is not None and prompt[-1].get("content") not in said:
            raise UserError(
                f"{origin}: the messages before the answers are not those of 'prompt'; leave "
                "'prompt' out, or give the answers alone"
            )
        prompt = before
    if not prompt:
        raise UserError(
            f"{origin}: 'chosen' and 'rejected' begin with no message in common; give 'prompt'"
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise UserError(f"{origin}: {name!r} must end with a message of the assistant")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _alike(prompt: Said, answer: Said) -> tuple[Said, Said]:
    """Both as texts, or both as messages."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
    return prompt, _answer(answer)


def _answer(said: Said) -> Messages:
    return ({"role": "assistant", "content": said},) if isinstance(said, str) else said


def _said(row: Mapping[str, object], field: str, origin: str) -> Said:
    value = row[field]
    if isinstance(value, list | tuple):
        return messages_of(value, origin, field)
    if not isinstance(value, str):
        raise UserError(
            f"{origin}: {field!r} must be a string or a list of messages, got {kind_of(value)}"
        )
    return string_of(row, field, origin)
