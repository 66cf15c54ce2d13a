"""What a configuration's `data` section says about the chat template and what it is given."""

from pathlib import Path
from typing import Any

from lora_engine.app.config_data import DataConfig
from lora_engine.data.inputs import TemplateInputs, check_variables, inputs_of
from lora_engine.errors import UserError, reason


def set_chat_template(tokenizer: Any, data: DataConfig) -> None:
    """Replace the tokenizer's chat template by `data.chat_template`, if there is one."""
    if data.chat_template is None:
        return
    text = data.chat_template
    tokenizer.chat_template = text if _is_template(text) else _read(text, "data.chat_template")


def template_inputs(data: DataConfig) -> TemplateInputs:
    """What the template is given for records without their own."""
    check_variables(data.chat_template_kwargs, "data.chat_template_kwargs")
    row: dict[str, object] = {"chat_template_kwargs": data.chat_template_kwargs}
    for name in ("tools", "documents"):
        value = getattr(data, name)
        row[name] = _read(value, f"data.{name}") if isinstance(value, str) else value
    return inputs_of(row, "data")


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text or "\n" in text


def _read(path: str, key: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read: {reason(error)}") from error
