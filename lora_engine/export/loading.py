"""PEFT's loader of saved adapters, whose complaints become one line."""

import warnings
from pathlib import Path
from typing import Any

from lora_engine.errors import UserError, is_out_of_memory, reason


def load_adapter(model: Any, folder: Path, name: str = "default") -> Any:
    """`model` with the adapter in `folder`, frozen, as `name`; the first in a new PeftModel.

    Raises UserError for what PEFT cannot load, and where the adapter's settings name a part of the
    model that it has no values for.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if isinstance(model, PeftModel):
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{folder}: PEFT cannot load this adapter, get its own files: {reason(error)}"
        ) from error
    for warning in told:
        if "missing adapter keys" in str(warning.message):
            raise UserError(
                f"{folder}: has no values for a part of the model that its settings name; get the "
                f"complete adapter: {reason(warning.message)}"  # type: ignore[arg-type]
            )
    return model
