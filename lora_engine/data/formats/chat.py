"""Conversations: `messages` as OpenAI and most others write them, ShareGPT's `conversations`, and
Gemini's `contents`.

Roles and keys that mean the same are read as one: human, gpt, observation, from, value, parts. A
call of a function becomes a tool call, a list of text parts one text. What is no text is refused.
"""

from collections.abc import Mapping, Sequence

from lora_engine.data.fields import kind_of
from lora_engine.data.formats.base import (
    FOR_TEMPLATES,
    Fields,
    Format,
    is_empty,
    parse_json,
    text_field,
    truth,
)
from lora_engine.errors import UserError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "prompter": "user",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
CALL = "function_call"
_STANDARD = ("system", "developer", "user", "assistant", "tool")
_PLAIN, _TURN = {"role", "content"}, {"input", "output"}
_ROLE_KEYS = ("role", "from")
_TEXT_KEYS = ("content", "value")
_LEARNED_KEYS = ("train", "training")
# Parts of contents in Anthropic's layout, and how the chats that are read here say the same.
_ELSEWHERE = {
    "tool_use": "'tool_calls' of the message",
    "tool_result": "a message of the role 'tool'",
    "thinking": "'reasoning_content' of the message",
}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
LISTS = ("messages", "conversations", "conversation", "contents")
_SYSTEM = ("system", "systemInstruction", "system_instruction")
_BESIDE = (*_SYSTEM, "functions", *FOR_TEMPLATES)


def is_conversation(value: object) -> bool:
    """Whether `value` is a list of objects, or a single one, that have a role."""
    listed = [value] if isinstance(value, Mapping) else value
    return (
        isinstance(listed, list | tuple)
        and len(listed) > 0
        and all(isinstance(m, Mapping) and any(k in m for k in _ROLE_KEYS) for m in listed)
    )


def messages_of(value: object, field: str) -> list[dict[str, object]]:
    """A list of messages, or a single one, in the usual keys and roles."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # of a table
        value = parse_json(value, repr(field))
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list | tuple) or not listed:
        raise UserError(f"{field!r} must be a non-empty list, got {kind_of(value)}")
    if all(
        isinstance(turn, Mapping) and turn.keys() >= _TURN and "role" not in turn for turn in listed
    ):
        listed = [message for turn in listed for message in _question_and_answer(turn)]
    if len(listed) > 1 and all(isinstance(said, str) for said in listed):  # in turn, as of LIMA
        roles = ("user", "assistant")
        listed = [{"role": roles[i % 2], "content": said} for i, said in enumerate(listed)]
    return [_message(message, f"message {i}") for i, message in enumerate(listed, start=1)]


def _question_and_answer(turn: Fields) -> list[Fields]:
    """Both messages of a turn that is written as an object of `input` and `output`."""
    return [
        {"role": "user", "content": turn["input"]},
        {"role": "assistant", "content": turn["output"]},
    ]


def conversation(row: Fields, field: str) -> dict[str, object]:
    """The conversation in `field` as a row of `messages`, with what its template takes."""
    messages = messages_of(row[field], field)
    return {"messages": with_system(row, messages), **for_template(row)}


def with_system(row: Fields, messages: Sequence[Fields]) -> list[Fields]:
    """`messages` begun with what the row's field `system` says, a text, parts or Gemini's."""
    field = next((name for name in _SYSTEM if not is_empty(row.get(name))), "system")
    system = _system(row.get(field), field)
    if not system.strip():
        return list(messages)
    if messages and messages[0].get("role") == "system":
        if messages[0].get("content") != system:
            raise UserError(f"has a system message and, in {field!r}, another; keep one of them")
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _system(value: object, field: str) -> str:
    parts = value.get("parts") if isinstance(value, Mapping) else value
    if isinstance(parts, list | tuple):
        return text_field({field: _text(parts, repr(field))}, field)
    return text_field({field: value}, field)


def for_template(row: Fields) -> dict[str, object]:
    """The fields of `row` that chat templates take: tools as a list of objects, the rest as is."""
    taken = {field: row[field] for field in FOR_TEMPLATES if not is_empty(row.get(field))}
    tools, where = taken.pop("tools", None), "'tools'"
    if tools is None and not is_empty(row.get("functions")):
        tools, where = row["functions"], "'functions'"
    if isinstance(tools, str):
        tools = parse_json(tools, where) if tools.strip() else None
    if is_empty(tools):
        return taken
    if not isinstance(tools, list | tuple):
        raise UserError(f"{where} must be a list, got {kind_of(tools)}")
    return {**taken, "tools": [_tool(tool, where) for tool in tools]}


def _tool(tool: object, where: str) -> Fields:
    if isinstance(tool, str):
        tool = parse_json(tool, where)
    if not isinstance(tool, Mapping):
        raise UserError(f"{where} must hold objects, got {kind_of(tool)}")
    if "name" in tool and "function" not in tool:  # bare, as ShareGPT and `functions` have them
        return {"type": "function", "function": tool}
    return tool


def _message(message: object, where: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object, got {kind_of(message)}")
    is_plain = message.keys() == _PLAIN and isinstance(message["content"], str)  # as most are
    if is_plain and message["role"] in _STANDARD:
        return dict(message)
    role_key, text_key = _key(message, _ROLE_KEYS, where), _key(message, _TEXT_KEYS, where)
    if message.get(text_key) is None and "parts" in message:
        text_key = "parts"
    made: dict[str, object] = {"role": _role(message, role_key, where)}
    if text_key in message:
        made["content"] = _text(message[text_key], where)
    used = (*_ROLE_KEYS, *_TEXT_KEYS, text_key, *_LEARNED_KEYS, CALL)
    made |= {key: value for key, value in message.items() if key not in used}
    if str(message.get(role_key)).lower().replace("-", "_") == CALL:
        made |= {"content": "", "tool_calls": _calls(made["content"], where)}
    elif not is_empty(message.get(CALL)):
        if not is_empty(message.get("tool_calls")):
            raise UserError(f"{where}: has both 'tool_calls' and '{CALL}'; keep one of them")
        made["tool_calls"] = _calls(message[CALL], where)
    for key in _LEARNED_KEYS:
        if message.get(key) is not None:
            learned = truth(message[key])
            if learned is None or made.get("weight") is not None:
                raise UserError(f"{where}: {key!r} must be true or false, without a 'weight'")
            made["weight"] = int(learned)
    for key in MEDIA:
        if not is_empty(message.get(key)):
            raise UserError(f"{where}: {media_problem(key)}")
    return made


def _key(message: Fields, keys: tuple[str, str], where: str) -> str:
    """The one of two keys that the message has; the first if none."""
    has = [key for key in keys if message.get(key) is not None]
    if len(has) > 1:
        raise UserError(f"{where}: has both {has[0]!r} and {has[1]!r}; keep one of them")
    return has[0] if has else keys[0]


def _role(message: Fields, key: str, where: str) -> object:
    role = message.get(key)
    if not isinstance(role, str):
        return role
    role = role.replace("-", "_") if key == "from" else role
    if (known := role.lower()) in (*_STANDARD, *ROLES, CALL):
        role = known
    if role == CALL:
        return "assistant"
    role = ROLES.get(role, role)
    if key == "from" and role not in _STANDARD:
        raise UserError(
            f"{where}: is from {role!r:.60}, expected one of {', '.join((*_STANDARD, *ROLES))}"
        )
    return role


def _text(content: object, where: str) -> object:
    """Parts of text as one text; other contents as they are."""
    if not isinstance(content, list | tuple) or not content:
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            return content
        kind = part.get("type")
        if isinstance(kind, str) and kind in _ELSEWHERE:
            raise UserError(f"{where}: has a part {kind!r}; write it as {_ELSEWHERE[kind]}")
        if isinstance(kind, str) and kind not in ("text", "input_text", "output_text", "refusal"):
            raise UserError(f"{where}: {media_problem(kind)}")
        text = part.get("text") if part.get("text") is not None else part.get("refusal")
        if not isinstance(text, str):
            return content
        texts.append(text)
    return "".join(texts)


def media_problem(what: str) -> str:
    """Why a record with images, sound or the like is refused."""
    return (
        f"holds {what!r}, and only text is learned from; leave the record out, or, if its text "
        "says all, the field"
    )


def _calls(value: object, where: str) -> list[Fields]:
    """Tool calls out of what `function_call` says, as text or objects, one or several."""
    value = parse_json(value, f"{where}: its function call") if isinstance(value, str) else value
    calls = value if isinstance(value, list | tuple) else [value]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise UserError(f"{where}: a function call needs a 'name' and its 'arguments'")
    return [{"type": "function", "function": call} for call in calls]


def _sharegpt_field(row: Fields) -> str | None:
    """The field that holds the conversation."""
    if "conversations" in row:
        return "conversations"
    return next(
        (name for name in ("conversation", "contents") if isinstance(row.get(name), list | tuple)),
        None,
    )


def _read_sharegpt(row: Fields) -> dict[str, object]:
    field = _sharegpt_field(row)
    assert field is not None
    return conversation(row, field)


MESSAGES = Format(
    "messages",
    needs="'messages'",
    fits=lambda row: "messages" in row,
    read=lambda row: conversation(row, "messages"),
    fields=("messages", *_BESIDE),
)
SHAREGPT = Format(
    "sharegpt",
    needs="'conversations'",
    fits=lambda row: _sharegpt_field(row) is not None,
    read=_read_sharegpt,
    fields=("conversations", "conversation", "contents", *_BESIDE),
)
FORMATS = (MESSAGES, SHAREGPT)
