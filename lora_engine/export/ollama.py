"""A Modelfile for Ollama: the GGUF file, the chat template in Go's language, where answers stop."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_engine.export.gguf_vocabulary import puts_start

# What the template writes is found out by asking it about these.
_CONTENT = {"system": "⟦S⟧", "user": "⟦U⟧", "assistant": "⟦A⟧"}
# By role and content: with and without a system's message, of one question and of two.
CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "one"),),
    (("system", "be"), ("user", "one")),
    (("user", "one"), ("assistant", "two"), ("user", "three")),
    (("system", "be"), ("user", "one"), ("assistant", "two"), ("user", "three")),
)


def modelfile(gguf_name: str, tokenizer: Any, stops: Sequence[int]) -> str:
    """The Modelfile for the file `gguf_name` beside it.

    stops: tokens that end an answer. A chat template that is no sequence of messages, each between
    two fixed texts, is left out, and a comment says so.
    """
    lines = [f"FROM ./{gguf_name}"]
    template = go_template(tokenizer)
    if template is not None:
        lines += [f'TEMPLATE """{template}"""']
    elif tokenizer.chat_template:
        lines += [
            "# The chat template has no counterpart in Ollama's language: write TEMPLATE by hand."
        ]
    ends = dict.fromkeys(i for i in (tokenizer.eos_token_id, *stops) if i is not None)
    for text in filter(None, map(tokenizer.convert_ids_to_tokens, ends)):
        escaped = str(text).replace("\\", "\\\\").replace('"', '\\"')
        lines += [f'PARAMETER stop "{escaped}"']
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any) -> str | None:
    """The chat template as Ollama takes it; None where a simple one does not write the same.

    What is written around each role's messages is found by rendering, and the result is compared
    with the template's own on conversations with and without a system message.
    """
    parts = _parts(tokenizer)
    if parts is None:
        return None
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in conversation]
        if render(tokenizer, messages, True) != _written(parts, conversation):
            return None
    if any("{{" in text or '"""' in text for text in parts.values()):
        return None
    roles = [("if", "system"), ("else if", "user"), ("else if", "assistant")]
    inner = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}'
        f"{parts[f'{role} before']}{{{{ .Content }}}}{parts[f'{role} after']}"
        for word, role in roles
    )
    default = ""
    if parts["default"]:
        default = f"{{{{ if not .System }}}}{parts['default']}{{{{ end }}}}"
    return f"{default}{{{{ range .Messages }}}}{inner}{{{{ end }}}}{{{{ end }}}}{parts['answer']}"


def _parts(tokenizer: Any) -> dict[str, str] | None:
    """What stands at the start, in place of a missing system message, around each role's messages,
    and before an answer."""
    asked = [{"role": "user", "content": _CONTENT["user"]}]
    system = [{"role": "system", "content": _CONTENT["system"]}]
    answered = [*asked, {"role": "assistant", "content": _CONTENT["assistant"]}]
    open_, closed = render(tokenizer, asked, True), render(tokenizer, asked, False)
    with_system = render(tokenizer, [*system, *asked], False)
    longer = render(tokenizer, [*system, *answered, *asked], False)
    if None in (open_, closed, with_system, longer) or not open_.startswith(closed):
        return None
    texts: dict[str, str] = {"answer": open_[len(closed) :]}
    before, mark, rest = longer.partition(_CONTENT["system"])
    to_user, mark_user, after_user = rest.partition(_CONTENT["user"])
    to_answer, mark_answer, after_answer = after_user.partition(_CONTENT["assistant"])
    if not (mark and mark_user and mark_answer):
        return None
    user_after = closed.partition(_CONTENT["user"])[2]
    if not to_answer.startswith(user_after):
        return None
    answer_after = render(tokenizer, answered, False).partition(_CONTENT["assistant"])[2]
    again = after_answer.partition(_CONTENT["user"])[0]
    if not again.startswith(answer_after):
        return None
    user_before = again[len(answer_after) :]
    head = closed.partition(_CONTENT["user"])[0]
    if not (head.endswith(user_before) and to_user.endswith(user_before)):
        return None
    # A start token that the GGUF file asks for is written by Ollama itself.
    start = tokenizer.bos_token if puts_start(tokenizer) else ""
    if not before.startswith(start):
        start = ""
    texts |= {
        "default": head[: len(head) - len(user_before)].removeprefix(start),
        "system before": before.removeprefix(start),
        "system after": to_user[: len(to_user) - len(user_before)],
        "user before": user_before,
        "user after": user_after,
        "assistant before": to_answer[len(user_after) :],
        "assistant after": answer_after,
        "bos": start,
    }
    return texts


def _written(parts: Mapping[str, str], conversation: Sequence[tuple[str, str]]) -> str:
    """What the template in Go's language writes, with the start token."""
    has_system = conversation[0][0] == "system"
    text = parts["bos"] + ("" if has_system else parts["default"])
    for role, content in conversation:
        text += parts[f"{role} before"] + content + parts[f"{role} after"]
    return text + parts["answer"]


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], prompt: bool) -> Any:
    """A conversation's text, with `prompt` that before an answer too. None where the template
    refuses the conversation, one with a system message, say."""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # templates raise what they like
        return None
