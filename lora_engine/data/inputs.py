"""What a chat template is given beside the messages: tools, documents and variables of its own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_engine.data.strings import check_strings
from lora_engine.errors import UserError

INPUT_FIELDS = ("tools", "documents", "chat_template_kwargs")
# What rendering itself is told by these names.
_RESERVED = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "tokenizer_kwargs"),
        *("chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
    )
)


@dataclass(frozen=True)
class TemplateInputs:
    """What a template is given beside the messages.

    tools: definitions of the functions that the assistant may call.
    documents: texts that it may look into.
    variables: the template's own, such as `enable_thinking`.
    """

    tools: tuple[object, ...] = ()
    documents: tuple[object, ...] = ()
    variables: Mapping[str, object] = field(default_factory=dict)

    def over(self, default: "TemplateInputs") -> "TemplateInputs":
        """These where there are any, otherwise those of `default`; variables one by one."""
        if self == NO_INPUTS or default == NO_INPUTS:
            return default if self == NO_INPUTS else self
        return TemplateInputs(
            self.tools or default.tools,
            self.documents or default.documents,
            {**default.variables, **self.variables},
        )


NO_INPUTS = TemplateInputs()


def inputs_of(row: Mapping[str, object], origin: str) -> TemplateInputs:
    """The fields INPUT_FIELDS of a row, each as it is or as JSON text.

    Raises UserError "origin: what is wrong".
    """
    if all(row.get(name) in (None, "", [], (), {}) for name in INPUT_FIELDS):
        return NO_INPUTS
    return TemplateInputs(
        _objects(row.get("tools"), "tools", origin),
        _objects(row.get("documents"), "documents", origin),
        _variables(row.get("chat_template_kwargs"), origin),
    )


def _objects(value: object, name: str, origin: str) -> tuple[object, ...]:
    value = _parsed(value, name, origin)
    if value in (None, "", {}):
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{origin}: {name!r} must be a list of objects, or one as JSON text")
    made = tuple(_parsed(item, name, origin) for item in value)
    if not all(isinstance(item, Mapping) for item in made):
        raise UserError(f"{origin}: {name!r} must be a list of objects, or one as JSON text")
    check_strings(made, f"{origin}: {name!r}")
    return made


def _variables(value: object, origin: str) -> Mapping[str, object]:
    name = "chat_template_kwargs"
    value = _parsed(value, name, origin)
    if value in (None, ""):
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{origin}: {name!r} must be an object, such as enable_thinking: false")
    check_strings(value, f"{origin}: {name!r}")
    check_variables(value, f"{origin}: {name!r}")
    return dict(value)


def check_variables(variables: Mapping[str, object], where: str) -> None:
    """Raises UserError for a name that is not a variable of the template's own."""
    for name in variables:
        if name in _RESERVED or not name.isidentifier():
            raise UserError(f"{where} cannot set {name!r}, which is no variable of a template")


def _parsed(value: object, name: str, origin: str) -> object:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: {name!r} is text that is not valid JSON") from error
