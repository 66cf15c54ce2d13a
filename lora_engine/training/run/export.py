"""The trained model as files that other libraries read.

A PeftModel becomes its adapter:

    adapter_config.json          names the base by its hub id, or by its file's or folder's name
    adapter_model.safetensors    in PEFT's format
    tokenizer.json, tokenizer_config.json, chat_template.jinja    what the run used
    trained_over.json            the packed bits of the base, and whether the adapter was in them
    base.json                    the base: hub id, revision, SHA-256 of its files
    value_head.safetensors       of a run of PPO: v_head.summary.weight and .bias
    README.md                    the model card: base (with the SHA-256 of its files), how to load
                                 it, data, settings, figures

Adapters with names of their own (all but `default`) have such a folder each. Another model becomes
all its weights, config.json, and the same tokenizer and card.
"""

import json
from pathlib import Path
from typing import cast

from torch import nn

from lora_engine.data.template import Tokenizer
from lora_engine.models.families.modules import CausalLm, PeftCausalLm
from lora_engine.models.load.origin import Base, base_of, write_base
from lora_engine.models.load.scalar import has_value_head, save_value_head
from lora_engine.models.load.trained_over import trained_over, write_trained_over
from lora_engine.models.load.transformers_files import quiet_transformers
from lora_engine.models.peft.routing import REFERENCE_ADAPTER, active_adapters, is_peft
from lora_engine.training.run.atomic import new_folder
from lora_engine.training.run.card import CardFacts, adapter_card, index_card, model_card


def export_model(
    model: nn.Module, tokenizer: Tokenizer | None, target: Path, facts: CardFacts
) -> None:
    """Write `model` into the folder `target`, replacing it.

    tokenizer: None leaves it out. The parameters must own their storage
    (`FlatParameters.release`).
    """
    base = base_of(model)
    with new_folder(target) as folder, quiet_transformers():
        if is_peft(model):
            model.save_pretrained(folder, selected_adapters=_saved(model))
            _complete_adapters(model, tokenizer, folder, base, facts)
        else:
            kept: dict[str, object] = {}
            if has_value_head(model):  # which has its own file
                state = model.state_dict()
                kept["state_dict"] = {k: x for k, x in state.items() if "value_head." not in k}
            cast(CausalLm, model).save_pretrained(folder, **kept)
            save_value_head(model, folder)
            _save_tokenizer(tokenizer, folder)
            card = model_card(base, facts, tokenizer=tokenizer is not None)
            _write(folder / "README.md", card)


def _complete_adapters(
    model: PeftCausalLm, tokenizer: Tokenizer | None, folder: Path, base: Base, facts: CardFacts
) -> None:
    """What PEFT leaves out of its folders, or writes for this machine alone."""
    active = active_adapters(model)
    for name in _saved(model):
        peft_config = model.peft_config[name]
        own = folder if name == "default" else folder / name
        _name_base(own / "adapter_config.json", base)
        write_base(own, base)
        write_trained_over(own, trained_over(model))
        save_value_head(model, own)
        _save_tokenizer(tokenizer, own)
        beside = [other for other in active if other != name]
        card = adapter_card(
            base, facts, peft_config, name=name, beside=beside, tokenizer=tokenizer is not None
        )
        _write(own / "README.md", card)
    if "default" not in model.peft_config:
        _write(folder / "README.md", index_card(base, _saved(model)))


def _saved(model: PeftCausalLm) -> list[str]:
    """The adapters that are a result of the run."""
    return [name for name in model.peft_config if name != REFERENCE_ADAPTER]


def _name_base(path: Path, base: Base) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = base.name or None
    values["revision"] = base.revision
    _write(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _save_tokenizer(tokenizer: Tokenizer | None, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
