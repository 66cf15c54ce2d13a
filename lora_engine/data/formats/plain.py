"""Text without a chat template: `text`, `prompt` and `completion`, and token ids."""

from collections.abc import Sequence

from lora_engine.data.fields import kind_of
from lora_engine.data.formats.base import FOR_TEMPLATES, Fields, Format, is_empty
from lora_engine.data.formats.chat import for_template, is_conversation, messages_of
from lora_engine.errors import UserError

IGNORED_LABEL = -100
_MASKS = ("labels", "completion_mask", "assistant_masks", "assistant_mask", "loss_mask")


def _read_pair(row: Fields) -> dict[str, object]:
    """Two strings as they stand; two conversations as one, of which the second is learned."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not is_conversation(prompt) and not is_conversation(completion):
        refuse_system(row)
        return {"prompt": prompt, "completion": completion}
    before = _turns(prompt, "prompt", "user")
    after = _turns(completion, "completion", "assistant")
    given = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in before]
    return {"messages": [*given, *after], **for_template(row)}


def _turns(value: object, field: str, role: str) -> list[dict[str, object]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages_of(value, field)


def refuse_system(row: Fields) -> None:
    """Raises UserError for a system message beside a plain prompt, which could not show it."""
    if is_empty(row.get("system")):
        return
    if "chosen" in row or "completion" not in row:
        beside = [
            field for field in ("chosen", "rejected", "completions", "scores") if field in row
        ]
        columns = ["system: system", "question: prompt", *(f"{name}: {name}" for name in beside)]
        hint = (
            f"for chats, say data.columns: {{{', '.join(columns)}}}"
            if beside
            else ("make a list of messages of both in 'prompt'")
        )
        raise UserError(f"has 'system' beside a plain prompt; {hint}")
    raise UserError(
        "has 'system' beside a plain prompt; say data.template: \"{system}\\n{prompt}\", or, "
        "for a chat, data.columns: {system: system, user: prompt, assistant: completion}"
    )


def _read_tokens(row: Fields) -> dict[str, object]:
    """Token ids, and which of them are learned: by labels, by a mask, or else all."""
    ids = _integers(row, "input_ids")
    given = [field for field in _MASKS if not is_empty(row.get(field))]
    if len(given) > 1:
        raise UserError(f"has both {given[0]!r} and {given[1]!r}; keep the one that counts")
    supervised = [True] * len(ids)
    if given:
        marks = _integers(row, given[0], len(ids))
        supervised = _learned(ids, marks) if given[0] == "labels" else _ones(marks, given[0])
    if not is_empty(row.get("attention_mask")):
        real = _ones(_integers(row, "attention_mask", len(ids)), "attention_mask")
        begin, end = real.index(True) if any(real) else 0, len(real) - real[::-1].index(True)
        if not all(real[begin:end]):
            raise UserError("'attention_mask' has a 0 between two 1s; unpack it into examples")
        ids, supervised = ids[begin:end], supervised[begin:end]
    return {"input_ids": ids, "supervised": supervised}


def _integers(row: Fields, field: str, length: int | None = None) -> list[int]:
    values = row[field]
    if not isinstance(values, list | tuple) or not values:
        raise UserError(f"{field!r} must be a list of whole numbers, got {kind_of(values)}")
    if not all(isinstance(value, int) for value in values):
        raise UserError(f"{field!r} must hold whole numbers")
    if length is not None and len(values) != length:
        raise UserError(f"{field!r} has {len(values):,} entries, 'input_ids' {length:,}")
    return [int(value) for value in values]


def _learned(ids: Sequence[int], labels: Sequence[int]) -> list[bool]:
    for token, label in zip(ids, labels, strict=True):
        if label not in (token, IGNORED_LABEL):
            raise UserError(
                f"'labels' must repeat 'input_ids', or be {IGNORED_LABEL} where nothing is "
                "learned; labels that are moved by one already must be moved back"
            )
    return [label != IGNORED_LABEL for label in labels]


def _ones(marks: Sequence[int], field: str) -> list[bool]:
    if any(mark not in (0, 1) for mark in marks):
        raise UserError(f"{field!r} must hold 0 and 1 alone")
    return [mark == 1 for mark in marks]


def _read_text(row: Fields) -> dict[str, object]:
    if isinstance(row.get("role"), str):
        raise UserError(
            f"is one message, of the role {row['role']!r:.40}, of a conversation that other "
            "records go on with; make a record of each conversation, with 'messages'"
        )
    return {"text": row["text"]}


TEXT = Format(
    "text", needs="'text'", fits=lambda row: "text" in row, read=_read_text, fields=("text",)
)
PAIR = Format(
    "prompt-completion",
    needs="'prompt' and 'completion'",
    fits=lambda row: "prompt" in row and "completion" in row,
    read=_read_pair,
    fields=("prompt", "completion", "system", *FOR_TEMPLATES),
    over=("prompts",),
)
TOKENS = Format(
    "tokens",
    needs="'input_ids'",
    fits=lambda row: "input_ids" in row,
    read=_read_tokens,
    fields=("input_ids", "attention_mask", "token_type_ids", "length", "position_ids", *_MASKS),
)
FORMATS = (TEXT, PAIR, TOKENS)
