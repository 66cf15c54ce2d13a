"""Any `torch.autocast` over weights of any type: what the model does without acceleration."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lora_engine
from lora_engine.testing import tiny_llama, with_lora

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
AUTOCAST = [torch.bfloat16, torch.float16]
IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.ones_like(IDS)
MASK[1, -4:] = 0
ADAPTERS: dict[str, dict[str, Any]] = {
    "on all linears": {},
    "of the weights' type": {"autocast_adapter_dtype": False},
    "on the head and the embedding": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "DoRA": {"use_dora": True},
    "none": {},
}


def made(weights: torch.dtype, adapters: str) -> Any:
    model = tiny_llama(dtype=weights)
    if adapters == "none":
        return model
    options = dict(ADAPTERS[adapters])
    same = not options.pop("autocast_adapter_dtype", True)
    model = with_lora(model, **options)
    return model.to(weights) if same else model


def training(model: Any) -> Iterator[torch.Tensor]:
    labels = IDS.masked_fill(MASK == 0, -100)
    output = model.train()(IDS, attention_mask=MASK, labels=labels)
    yield output.loss
    yield output.logits[MASK.bool()]
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(output.loss, trained)
    assert [grad.dtype for grad in grads] == [p.dtype for p in trained]
    yield torch.cat([grad.flatten().float() for grad in grads])


def inference(model: Any) -> Iterator[torch.Tensor]:
    with torch.no_grad():
        yield model.eval()(IDS, attention_mask=MASK).logits[MASK.bool()]


def generation(model: Any) -> Iterator[torch.Tensor]:
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "output_scores": True}
    mask = MASK.flip(1)
    given = {"attention_mask": mask, "return_dict_in_generate": True, **options}
    yield from model.eval().generate(IDS, **given).scores


@pytest.mark.parametrize("weights", TYPES, ids=str)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_results_are_as_without(adapters: str, weights: torch.dtype) -> None:
    ours, plain = made(weights, adapters), made(weights, adapters)
    lora_engine.accelerate(ours)
    for autocast, use in itertools.product(AUTOCAST, (training, inference, generation)):
        with torch.autocast("cpu", autocast):
            results = [list(use(model)) for model in (ours, plain)]
        for found, expected in zip(*results, strict=True):
            assert found.isfinite().all()
            off = (found.float() - expected.float()).norm() / expected.float().norm()
            assert off < 5e-2, (autocast, use.__name__, float(off))


def test_of_the_weights_own_type_keeps_our_products() -> None:
    """And those of another half precision are the model's own."""
    results = []
    for autocast in (torch.bfloat16, torch.float16):
        model = with_lora(tiny_llama(dtype=torch.bfloat16))
        lora_engine.accelerate(model)
        with torch.autocast("cpu", autocast):
            layer = model.get_base_model().model.layers[0].mlp.down_proj
            results.append(layer(torch.ones(2, 48, dtype=torch.bfloat16)).dtype)
    assert results == [torch.bfloat16, torch.float16]
