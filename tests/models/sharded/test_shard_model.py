"""Models whose linears are in shards, in one process: what the others would gather is not asked."""

import peft
import pytest
import torch
from training_helpers import tiny_llama

from lora_engine.distributed.world import ALONE, World
from lora_engine.errors import UserError
from lora_engine.models.peft.adapters import LoraConfig, add_adapters
from lora_engine.models.quantized.quantize import quantize_model
from lora_engine.models.quantized.stored import weight_count
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.models.sharded.shard import is_sharded, shard_model
from lora_engine.objectives.sft import SFT
from lora_engine.training.run.identity import run_identity

HALF = World(0, 2)
FORMATS = [None, "nf4", "int8"]


def model_of(format, world):
    model = tiny_llama()
    if format is not None:
        quantize_model(model, format)
    if world is not None:
        shard_model(model, world)
    return model


def adapted(model):
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, lora)


@pytest.mark.parametrize("format", FORMATS)
def test_a_sharded_model_computes_the_same(format):
    """Also without accelerate, forward and backward."""
    ids = torch.arange(12)[None]
    results = []
    for world in (None, ALONE):
        model = adapted(model_of(format, world))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, grads), (own_loss, own_grads) = results
    assert torch.equal(own_loss, loss)
    for name, grad in grads.items():
        assert (grad is None) == (own_grads[name] is None)
        assert grad is None or torch.allclose(own_grads[name], grad, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_on_a_sharded_model_is_the_same_run(format):
    identities = [
        run_identity(adapted(model_of(format, world)), None, {}, SFT(), {}, {"weights": "x"})
        for world in (None, HALF)
    ]
    assert identities[0] == identities[1]


def test_each_process_keeps_its_part_and_no_more():
    model = model_of(None, HALF)
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    assert is_sharded(model) and len(linears) == 14
    assert type(model.lm_head) is torch.nn.Linear
    for linear in linears:
        values = linear.in_features * linear.out_features
        assert weight_count(linear) == values
        assert linear.weight.untyped_storage().nbytes() == linear.weight.element_size()
        assert linear.sharded.shard.nbytes == values * 4 // 2
        assert bool(linear.weight.isnan().all())
    assert not is_sharded(tiny_llama())


def test_the_dtype_of_a_model_leaves_shards_as_they_are():
    linear = next(m for m in model_of(None, HALF).modules() if isinstance(m, ShardedLinear))
    before = linear.sharded
    linear.to(torch.bfloat16)
    assert linear.sharded is before and linear.weight.dtype == torch.float32


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(UserError, match="shard the model before that"):
        shard_model(adapted(tiny_llama()), HALF)
    with pytest.raises(UserError, match="no linear"):
        shard_model(torch.nn.Sequential(torch.nn.Embedding(3, 2)), HALF)
    saved = LoraConfig(modules_to_save=("down_proj",), target_modules=("q_proj",))
    with pytest.raises(UserError, match="whose weight is in shards"):
        add_adapters(model_of(None, HALF), saved)
