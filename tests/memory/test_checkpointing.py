"""Every policy trains to bitwise the same weights in less memory."""

import pytest
import torch
import transformers
from tiny_model import SMALL
from training_helpers import TRAIN, make_trainer, tiny_llama, tiny_lora, trainable
from two_adapters import BOTH, two_adapters

import lora_engine
from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import batch_loss
from lora_engine.memory.checkpointing import checkpointing
from lora_engine.memory.measured import peak_cpu_bytes
from lora_engine.memory.policy import policy_of
from lora_engine.models.attach.forwards import own_forward
from lora_engine.models.peft.routing import adapters_of
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama as llama_of
from lora_engine.testing import with_lora

POLICIES = ["layer", "half", "selective", "every_2"]


def with_dropout():
    return with_lora(llama_of(vocab_size=61, layers=3), lora_dropout=0.3)


def with_magnitudes_in_bfloat16():
    return with_lora(llama_of(vocab_size=61, dtype=torch.bfloat16), use_dora=True)


def with_head_norms_and_a_window():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SMALL, head_dim=8, use_sliding_window=True, sliding_window=3, max_window_layers=1
    )
    return with_lora(transformers.Qwen3ForCausalLM(config))


def step(model, batch):
    """The loss of a batch and the gradients, after the same draws of dropout."""
    torch.manual_seed(5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with adapters_of(model, batch):
        total = batch_loss(model, batch, SFT()).total
        return [total, *torch.autograd.grad(total, parameters)]


def assert_same_step(model, batch, policy):
    expected = step(model, batch)
    with checkpointing(model, policy):
        found = step(model, batch)
    assert len(found) > 20 and any(gradient.any() for gradient in found[1:])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "make", [with_dropout, with_magnitudes_in_bfloat16, with_head_norms_and_a_window]
)
def test_loss_and_gradients_are_bitwise_those_without(make, policy):
    model = make()
    lora_engine.accelerate(model, strict=True)
    assert_same_step(model, collate(TRAIN.examples[:9]), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_several_adapters_that_share_prefixes(policy):
    assert_same_step(two_adapters(), collate(BOTH.examples, share_prefixes=True), policy)


@pytest.mark.parametrize("policy", ["layer", "every_2"])
def test_a_model_that_is_not_accelerated(policy):
    assert_same_step(tiny_lora(dropout=0.2), collate(TRAIN.examples[:9]), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_second_backward_pass_over_a_kept_graph(policy):
    model = with_lora(llama_of(vocab_size=61))
    lora_engine.accelerate(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with checkpointing(model, policy):
        loss = batch_loss(model, collate(TRAIN.examples[:9]), SFT()).total
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


HIDDEN, TOKENS = 64, 256
# The most that a layer may keep, in tensors [tokens, hidden] of float32; "none" keeps 12.5.
KEPT = {"every_2": 7, "selective": 2.3, "half": 2.2, "layer": 1.1}


def peak_of(layers, policy):
    """Of a step, in such tensors."""
    model = with_lora(
        llama_of(hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, layers=layers, kv_heads=4)
    )
    lora_engine.accelerate(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(97, (TOKENS,), generator=generator).tolist()
    batch = collate([Example(ids, [False] * (TOKENS - 8) + [True] * 8, "made:1")])
    with checkpointing(model, policy):
        return peak_cpu_bytes(lambda: step(model, batch)) / (HIDDEN * TOKENS * 4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_more_costs_no_more_than_the_policy_keeps(policy):
    assert peak_of(6, policy) - peak_of(2, policy) < 4 * KEPT[policy]


def test_attention_runs_once_where_its_output_is_kept(monkeypatch):
    from lora_engine.backends.cpu import attention

    runs = []
    own = attention.attention_fwd
    monkeypatch.setattr(
        attention, "attention_fwd", lambda *a, **k: (runs.append(1), own(*a, **k))[1]
    )
    model = with_lora(llama_of(vocab_size=61))
    lora_engine.accelerate(model)
    counts = {}
    for policy in ("none", "selective", "half", "layer"):
        runs.clear()
        with checkpointing(model, policy):
            step(model, collate(TRAIN.examples[:9]))
        counts[policy] = len(runs)
    assert counts == {"none": 2, "selective": 2, "half": 4, "layer": 4}


def test_layers_are_afterwards_what_they_were():
    model = with_lora(llama_of())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.get_base_model().model.layers
    before = [vars(layer).get("_gradient_checkpointing_func") for layer in layers]
    with checkpointing(model, "none"):
        assert not any(layer.gradient_checkpointing for layer in layers)
    assert all(layer.gradient_checkpointing for layer in layers)
    assert [vars(layer).get("_gradient_checkpointing_func") for layer in layers] == before


@pytest.mark.parametrize("policy", ["half", "selective"])
def test_layers_that_cannot_be_taken_apart_are_named(policy):
    with (
        pytest.raises(UserError, match=rf"^checkpointing {policy}: layer 0 \(LlamaDecoderLayer\)"),
        checkpointing(tiny_lora(), policy),
    ):
        pass


def test_a_model_without_such_layers_is_named():
    with (
        pytest.raises(UserError, match="Linear has no layers that can run again"),
        checkpointing(torch.nn.Linear(2, 2), "layer"),
    ):
        pass


def test_attention_run_by_its_modules_cannot_be_kept():
    model = with_lora(llama_of(vocab_size=61))
    lora_engine.accelerate(model)
    layer = model.get_base_model().model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: None)
    with checkpointing(model, "selective"), pytest.raises(UserError, match="take checkpointing"):
        step(model, collate(TRAIN.examples[:9]))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("none", []), ("layer", [0, 1, 2, 3, 4]), ("every_2", [0, 2, 4]), ("every_3", [0, 3])],
)
def test_which_layers_run_again(name, layers):
    policy = policy_of(name)
    assert [index for index in range(5) if policy.covers(index)] == layers


@pytest.mark.parametrize("name", ["", "every_0", "every_x", "every", "Layer", "layers"])
def test_an_unknown_policy(name):
    with pytest.raises(ValueError, match=r"expected none, layer, half, selective, every_N"):
        policy_of(name)


def test_a_run_under_a_policy_has_the_same_weights(tmp_path):
    weights = {}
    for policy in (None, "half"):
        model = tiny_lora(dropout=0.2)
        lora_engine.accelerate(model)
        make_trainer(tmp_path / str(policy), model, checkpointing=policy, max_steps=3).fit()
        weights[policy] = trainable(model)
    assert all(torch.equal(weights[None][name], w) for name, w in weights["half"].items())


def test_a_run_without_adapters(tmp_path):
    weights = {}
    for policy in (None, "layer"):
        model = tiny_llama()
        make_trainer(tmp_path / str(policy), model, checkpointing=policy, max_steps=2).fit()
        weights[policy] = trainable(model)
    assert all(torch.equal(weights[None][name], w) for name, w in weights["layer"].items())


def test_a_run_is_resumed_under_another_policy(tmp_path):
    whole, parts = tiny_lora(), tiny_lora()
    make_trainer(tmp_path / "whole", whole, schedule="constant").fit()
    make_trainer(tmp_path / "parts", parts, schedule="constant", max_steps=3).fit()
    make_trainer(tmp_path / "parts", parts, schedule="constant", checkpointing="layer").fit(
        resume=True
    )
    assert all(torch.equal(trainable(parts)[n], w) for n, w in trainable(whole).items())


@pytest.mark.parametrize(
    "make", [with_magnitudes_in_bfloat16, with_head_norms_and_a_window, two_adapters]
)
@pytest.mark.parametrize("tile", [1, 16, 1000])
def test_tiles_sum_the_same_gradients(make, tile):
    """In another order: to the rounding of sums, bitwise where one tile holds all."""
    model = make()
    if make is not two_adapters:
        lora_engine.accelerate(model, strict=True)
    batch = collate((BOTH if make is two_adapters else TRAIN).examples[:9])
    assert 16 < batch.num_rows < 1000
    expected = step(model, batch)
    with checkpointing(model, f"tiled_{tile}"):
        found = step(model, batch)
    loose = 0.05 if make is with_magnitudes_in_bfloat16 else 1e-4
    for a, b in zip(found, expected, strict=True):
        if tile == 1000:
            assert torch.equal(a, b)
        else:
            assert (a - b).norm() <= loose * b.norm() + 1e-6


def test_a_process_without_tokens_has_one_empty_tile():
    """As where processes share a batch of fewer tokens than they are."""
    model = with_lora(llama_of(vocab_size=61)).train()
    lora_engine.accelerate(model, strict=True)
    backbone = model.get_base_model().model
    with checkpointing(model, "tiled_8"):
        x = torch.zeros(1, 0, backbone.config.hidden_size, requires_grad=True)
        y = own_forward(backbone.layers[0])._fed_in_tiles(x, None)
        y.sum().backward()
    assert y.shape == x.grad.shape == x.shape


def test_a_wider_mlp_costs_no_more_in_tiles():
    def of_inner(inner, policy):
        model = with_lora(llama_of(hidden_size=HIDDEN, intermediate_size=inner, layers=2))
        lora_engine.accelerate(model)
        ids = torch.randint(97, (TOKENS * 4,), generator=torch.Generator().manual_seed(0)).tolist()
        batch = collate([Example(ids, [False] * 8 + [True] * (TOKENS * 4 - 8), "made:1")])
        with checkpointing(model, policy):
            return peak_cpu_bytes(lambda: step(model, batch)) / (HIDDEN * TOKENS * 4 * 4)

    assert of_inner(20 * HIDDEN, "tiled_32") < 0.5 * of_inner(20 * HIDDEN, "half")
