"""Which attention a model's layers run: lora_engine's in the place of the model's own."""

from collections.abc import Iterator

from lora_engine.models.attach import attention_function
from lora_engine.models.attach.patches import Patches
from lora_engine.models.families.modules import CausalLm, Config


def use_attention(model: CausalLm, patches: Patches) -> str | None:
    """Puts lora_engine's attention under a transformers model.

    Returns the name of the model's own, or None where its class takes no other.
    """
    before = model.config._attn_implementation
    attention_function.register()
    model.set_attn_implementation(attention_function.IMPLEMENTATION)
    if model.config._attn_implementation != attention_function.IMPLEMENTATION:
        return None
    patches.on_undo(_set_back, model, before)
    for config in list(_copied_configs(model, before)):
        config._attn_implementation = attention_function.IMPLEMENTATION
        patches.on_undo(_set_copy_back, config, before)
    if hasattr(model, "generate_batch"):
        patches.set_attribute(model, "generate_batch", _GenerateBatch(model, before))
    return before


class _GenerateBatch:
    """`generate_batch` with the model's own attention, which knows its paged cache."""

    def __init__(self, model: CausalLm, own: str) -> None:
        self.model, self.own, self.original = model, own, model.generate_batch

    def __call__(self, *args: object, **kwargs: object) -> object:
        chosen = self.model.config._attn_implementation
        if chosen != attention_function.IMPLEMENTATION:
            return self.original(*args, **kwargs)
        self.model.set_attn_implementation(self.own)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.model.set_attn_implementation(chosen)


def _set_back(model: CausalLm, before: str) -> None:
    """Leaves an attention that somebody has chosen meanwhile."""
    if _runs(model.config, attention_function.IMPLEMENTATION):
        model.set_attn_implementation(before)


def _set_copy_back(config: Config, before: str) -> None:
    if _runs(config, attention_function.IMPLEMENTATION):
        config._attn_implementation = before


def _copied_configs(model: CausalLm, implementation: str) -> Iterator[Config]:
    """Configurations that layers have to themselves: PEFT copies layers with theirs."""
    from transformers import PreTrainedModel

    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    shared = {id(part.config) for part in models}
    kinds = {
        type(part.config)
        for part in models
        if _runs(part.config, attention_function.IMPLEMENTATION)
    }
    for part in model.modules():
        config: Config | None = vars(part).get("config")
        if config is None or type(config) not in kinds or id(config) in shared:
            continue
        if _runs(config, implementation):
            yield config


def _runs(config: Config, implementation: str) -> bool:
    return config._attn_implementation == implementation
