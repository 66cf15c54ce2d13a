"""What PEFT can do with an accelerated model, step by step beside the same without."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import lora_engine
from lora_engine.testing import tiny_llama

IDS = torch.arange(3, 63).view(3, 20)
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
MASK[2, -3:] = 0

Accelerate = Callable[[Any], Any]


def lora(**options: Any) -> peft.LoraConfig:
    defaults = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**defaults, **options})


def adapted(config: Any, **options: Any) -> Any:
    return disturbed(peft.get_peft_model(tiny_llama(), config, **options))


def disturbed(model: Any) -> Any:
    """`model` with no trained parameter at its starting value, which could hide a mistake."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model: Any) -> torch.Tensor:
    """[T, V] of the tokens that are no padding."""
    with torch.no_grad():
        rows = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    return rows[:, -IDS.shape[1] :][MASK.bool()]  # virtual tokens stand before them


def step(model: Any) -> list[torch.Tensor]:
    """Loss and gradients of a training step, which is taken."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    torch.manual_seed(1)
    labels = IDS.masked_fill(MASK == 0, -100)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=labels).loss
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    with torch.no_grad():
        for parameter, grad in zip(trained, grads, strict=True):
            parameter.sub_(0.05 * grad if grad is not None else 0.0)
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


def everything(model: Any) -> Iterator[torch.Tensor]:
    yield logits(model)
    yield from step(model)
    yield logits(model)


def merges(accelerate: Accelerate, **options: Any) -> Iterator[torch.Tensor]:
    model = adapted(lora(**options))
    accelerate(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        yield logits(model)
        model.unmerge_adapter()
        yield from everything(model)
    model.merge_adapter()
    with model.disable_adapter():
        yield logits(model)
    accelerate(model)  # merged
    yield logits(model)
    yield logits(model.merge_and_unload())


def merges_dora(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    yield from merges(accelerate, use_dora=True)


def merges_embeddings(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    yield from merges(accelerate, target_modules=["embed_tokens", "lm_head", "q_proj"])


def adds_and_deletes(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    model = adapted(lora())
    accelerate(model)
    model.add_adapter("other", lora(r=7, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    yield from everything(model)
    accelerate(model)
    yield from everything(model)
    for kind in ("cat", "linear", "svd"):
        names, weights = (
            (["default"], [0.5]) if kind == "linear" else (["default", "other"], [1, -2])
        )
        model.add_weighted_adapter(names, weights, kind, combination_type=kind)
        model.set_adapter(kind)
        yield from everything(model)
    model.delete_adapter(kind)
    model.delete_adapter("other")
    model.set_adapter("default")
    yield from everything(model)


def scales(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    model = adapted(lora())
    accelerate(model)
    with rescale_adapter_scale(model, 0.3):
        yield from everything(model)
    yield logits(model)
    layers = [part for part in model.modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.scale_layer(0.5)
    yield from everything(model)
    for layer in layers:
        layer.unscale_layer()
    yield logits(model)


def swaps(accelerate: Accelerate, path: Path, **options: Any) -> Iterator[torch.Tensor]:
    adapted(lora(**options, lora_alpha=31)).save_pretrained(path)
    model = peft.get_peft_model(tiny_llama(), lora())
    if options:  # other ranks, and scalings that are tensors
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    accelerate(model)
    yield from everything(model)
    hotswap_adapter(model, str(path), "default")
    yield from everything(model)


def swaps_after_preparation(accelerate: Accelerate, path: Path) -> Iterator[torch.Tensor]:
    yield from swaps(accelerate, path, r=3)


def mixes_batches(accelerate: Accelerate, **options: Any) -> Iterator[torch.Tensor]:
    model = peft.get_peft_model(tiny_llama(), lora(**options))
    model.add_adapter("other", lora(**options))
    accelerate(disturbed(model))
    for names in (["default", "other", "__base__"], ["other"] * 3, ["__base__"] * 3):
        with torch.no_grad():
            given = {"input_ids": IDS, "attention_mask": MASK, "adapter_names": names}
            yield model.eval()(**given).logits[MASK.bool()]
        yield logits(model)
    tokens = model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=4, num_beams=2)
    yield tokens.float()


def mixes_batches_in_embeddings(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    yield from mixes_batches(accelerate, target_modules=["embed_tokens", "q_proj", "lm_head"])


def mixes_batches_of_saved_heads(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    yield from mixes_batches(accelerate, target_modules=["q_proj"], modules_to_save=["lm_head"])


def trains_whole_modules(accelerate: Accelerate, *names: str) -> Iterator[torch.Tensor]:
    config = lora(target_modules=["v_proj"], modules_to_save=list(names))
    model = adapted(config)
    accelerate(model)
    yield from everything(model)
    with model.disable_adapter():
        yield logits(model)
    model.add_adapter("other", lora(r=2, target_modules=["up_proj"], modules_to_save=list(names)))
    model.set_adapter("other")
    yield from everything(disturbed(model))
    accelerate(model)
    yield from everything(model)
    model.set_adapter("default")
    yield from everything(model)
    yield logits(model.merge_and_unload())


def trains_norms(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    yield from trains_whole_modules(accelerate, "norm", "post_attention_layernorm")


def trains_a_projection(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    yield from trains_whole_modules(accelerate, "q_proj", "down_proj")


def trains_a_layer(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    yield from trains_whole_modules(accelerate, "layers.0")


def trains_tokens(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    model = adapted(lora(trainable_token_indices=[3, 5, 9]))
    accelerate(model)
    yield from everything(model)
    model.merge_adapter()
    yield logits(model)
    model.unmerge_adapter()
    model.add_adapter("other", lora(r=2, trainable_token_indices=[4]))
    model.set_adapter("other")
    yield from everything(disturbed(model))
    accelerate(model)
    yield from everything(model)


def trains_parameters(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    names = ["q_proj.weight", "gate_proj.weight", "down_proj.weight"]
    model = adapted(lora(target_modules=[], target_parameters=names))
    accelerate(model)
    yield from everything(model)
    with model.disable_adapter():
        yield logits(model)
    model.merge_adapter()
    yield logits(model)


def repeats_layers(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    model = adapted(lora(layer_replication=[[0, 2], [0, 2]]))
    accelerate(model)
    yield from everything(model)


def mixes_tuners(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    model = adapted(lora(), mixed=True)
    model.add_adapter("loha", peft.LoHaConfig(r=3, target_modules=["q_proj"], init_weights=False))
    for names in (["default", "loha"], "loha", "default"):
        model.set_adapter(names)
        accelerate(model)
        yield from everything(model)
    yield logits(model.merge_and_unload())


def uses_a_tuner_by_itself(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    model = disturbed(peft.LoraModel(tiny_llama(), lora(), "default"))
    accelerate(model)
    yield from everything(model)
    yield logits(model.merge_and_unload())


def uses_transformers_own_way(accelerate: Accelerate) -> Iterator[torch.Tensor]:
    model = tiny_llama()
    model.add_adapter(lora(), adapter_name="one")
    accelerate(disturbed(model))
    yield from everything(model)
    model.add_adapter(lora(), adapter_name="two")
    yield from everything(model)
    accelerate(model)
    model.set_adapter("one")
    yield from everything(model)
    model.disable_adapters()
    yield logits(model)
    model.enable_adapters()
    yield logits(model)


LIVES: list[Callable[..., Iterator[torch.Tensor]]] = [
    merges,
    merges_dora,
    merges_embeddings,
    adds_and_deletes,
    scales,
    swaps,
    swaps_after_preparation,
    mixes_batches,
    mixes_batches_in_embeddings,
    mixes_batches_of_saved_heads,
    trains_norms,
    trains_a_projection,
    trains_a_layer,
    trains_tokens,
    trains_parameters,
    repeats_layers,
    mixes_tuners,
    uses_a_tuner_by_itself,
    uses_transformers_own_way,
]
TUNERS: dict[str, dict[str, Any]] = {
    "AdaLora": {"total_step": 10},
    "AdaptionPrompt": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 4},
    "FourierFT": {"n_frequency": 10},
    "HRA": {"r": 4},
    "IA3": {},
    "LNTuning": {},
    "LoHa": {"r": 4},
    "LoKr": {"r": 4},
    "Miss": {"r": 2},
    "OFT": {"oft_block_size": 4},
    "PrefixTuning": {"num_virtual_tokens": 5},
    "PromptEncoder": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "PromptTuning": {"num_virtual_tokens": 5},
    "RandLora": {"r": 4},
    "TrainableTokens": {"token_indices": [3, 5]},
    "VBLoRA": {"num_vectors": 4, "vector_length": 4},
    "Vera": {"r": 4},
}


def assert_same_lives(life: Callable[[Accelerate], Iterator[torch.Tensor]]) -> None:
    accelerated: list[Any] = []

    def accelerate(model: Any) -> None:
        accelerated.append(lora_engine.accelerate(model))

    theirs, ours = list(life(lambda model: None)), list(life(accelerate))
    assert accelerated and all("blocks" in str(report) for report in accelerated)
    assert len(ours) == len(theirs)
    for number, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
        worst = (mine - plain).abs().max() / plain.abs().max().clamp(min=1e-6)
        assert worst < 1e-3, f"step {number}"


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_a_life_with_lora_is_as_without(
    life: Callable[..., Iterator[torch.Tensor]], tmp_path: Path
) -> None:
    needs_path = "path" in life.__code__.co_varnames[: life.__code__.co_argcount]
    assert_same_lives((lambda a: life(a, tmp_path)) if needs_path else life)


@pytest.mark.parametrize("name", TUNERS)
def test_other_tuners_train_and_generate_as_without(name: str) -> None:
    def life(accelerate: Accelerate) -> Iterator[torch.Tensor]:
        config = getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", **TUNERS[name])
        model = adapted(config)
        accelerate(model)
        yield from everything(model)
        with model.disable_adapter():
            yield logits(model)
        yield model.eval().generate(input_ids=IDS, max_new_tokens=3).float()

    assert_same_lives(life)


def test_layers_that_share_weights_are_told_in_the_report() -> None:
    report = lora_engine.accelerate(adapted(lora(layer_replication=[[0, 2], [0, 2]])))
    assert {entry.detail for entry in report.left} == {"it shares its weight with another layer"}
    assert {entry.module.split(".")[2] for entry in report.left} == {"2", "3"}
