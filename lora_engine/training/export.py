"""The trained model as files that other libraries read."""

from pathlib import Path
from typing import Any

from lora_engine.training.atomic import new_folder


def export_model(model: Any, tokenizer: Any, target: Path) -> None:
    """Write `model` into the folder `target`, replacing it.

    A PeftModel writes its adapter in PEFT's format; a plain transformers model all its weights,
    with the tokenizer beside them. The parameters must own their storage
    (`FlatParameters.release`).
    """
    from peft import PeftModel

    with new_folder(target) as folder:
        model.save_pretrained(folder)
        if not isinstance(model, PeftModel) and tokenizer is not None:
            tokenizer.save_pretrained(folder)
