"""How a tokenizer's chat template writes plain messages, many of them, and what is known of it."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.template import SECONDS, Message, Tokenizer, render, time_limit
from lora_engine.data.text_flow import only_writes_texts


class _Compiled(Protocol):
    """What is used of a jinja2.Template."""

    def render(self, **variables: object) -> str: ...


class Writing:
    """How a tokenizer's template writes messages of `role` and `content`, in less time than
    `render` takes: without the copies that `apply_chat_template` makes."""

    def __init__(self, tokenizer: Tokenizer, inputs: TemplateInputs) -> None:
        self._tokenizer, self._inputs = tokenizer, inputs
        self._tools, self._documents = list(inputs.tools) or None, list(inputs.documents) or None
        self._given = {**tokenizer.special_tokens_map, **inputs.variables}

    @cached_property
    def _compiled(self) -> Callable[[str], _Compiled] | None:
        """Makes a template of its text; None where the tokenizer writes chats in its own way."""
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils

        own = getattr(type(self._tokenizer), "apply_chat_template", None)
        if own is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        return getattr(chat_template_utils, "_compile_jinja_template", None)

    @cached_property
    def _template(self) -> str:
        if not self._tokenizer.chat_template:
            return ""
        return self._tokenizer.get_chat_template(None, self._tools)

    def only_writes_texts(self, template: str | None) -> bool:
        """Whether that is known of the template, or the tokenizer's: see `text_flow`."""
        if self._compiled is None:
            return False
        return only_writes_texts(template or self._template, self._given)

    def render(
        self, messages: Sequence[Message], generation_prompt: bool, template: str | None
    ) -> str:
        """What `render` gives by the template, or the tokenizer's; raises what that raises."""
        if self._compiled is None:
            return render(
                messages,
                self._tokenizer,
                "",
                generation_prompt=generation_prompt,
                inputs=self._inputs,
                chat_template=template,
            )
        with time_limit(SECONDS):
            return self._compiled(template or self._template).render(
                messages=list(messages),
                tools=self._tools,
                documents=self._documents,
                add_generation_prompt=generation_prompt,
                **self._given,
            )
