"""The adapters of a run: from their section of the configuration to PEFT's layers."""

import warnings

import peft
import pytest
import torch

from lora_engine.app.finetune import add_adapters as add_adapters_of_finetune
from lora_engine.backends import devices
from lora_engine.errors import UserError
from lora_engine.models.peft.adapters import LoraConfig, add_adapters
from lora_engine.testing import tiny_llama


def add(model=None, **settings):
    return add_adapters(tiny_llama() if model is None else model, LoraConfig(**settings))


def test_peft_gets_every_setting():
    model = add(
        r=3, alpha=5, dropout=0.25, rslora=True, target_modules=["q_proj"], modules_to_save=["norm"]
    )
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    assert layer.r == {"default": 3}
    assert layer.scaling["default"] == pytest.approx(5 / 3**0.5)
    assert layer.lora_dropout["default"].p == 0.25
    trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "modules_to_save"}
    assert add_adapters_of_finetune is add_adapters


def test_initial_values_are_the_seeds():
    def values(seed):
        torch.manual_seed(seed + 1)  # what was drawn before makes no difference
        return add(seed=seed, adapters={"a": {}, "b": {"r": 16}}).state_dict()

    first, again, other = values(0), values(0), values(7)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.{}.weight"
    assert torch.equal(first[key.format("a")], again[key.format("a")])
    assert torch.equal(first[key.format("a")], first[key.format("b")])
    assert not torch.equal(first[key.format("a")], other[key.format("a")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["q_proj"], "adapters": {"a": {"target_modules": ["k_pro"]}}},
            "lora.adapters.a.target_modules: 'k_pro' matches no module of the model; did you mean "
            "k_proj?",
        ),
        (
            {"target_modules": ["k_pro"], "adapters": {"a": {"r": 3}}},
            "lora.target_modules: 'k_pro' matches no module of the model; did you mean k_proj?",
        ),
        (
            {"adapters": {"en": {}, "self_attn": {}}},
            "lora.adapters: 'self_attn' is a part of the names of the model's weights, where PEFT "
            "looks for adapters' names; take another",
        ),
        (
            {"bias": "all"},
            "lora.bias: the model has no bias terms to train; leave it at none",
        ),
        (
            {"bias": "lora_only"},
            "lora.bias: what gets an adapter has no bias terms to train; leave it at none",
        ),
        (
            {"r": 10**6},
            "lora.r: 1,000,000 is more than the widest layer it "
            "is for, 48: the adapter would be larger than the layer; ranks from 8 to 256 are usual",
        ),
        (
            {"target_modules": ["embed_tokens"], "adapters": {"a": {"r": 33}}},
            "lora.adapters.a.r: 33 is more than the widest layer it is for, 32: the adapter would "
            "be larger than the layer; ranks from 8 to 256 are usual",
        ),
        (
            {"ensure_weight_tying": True},
            "lora.ensure_weight_tying: there is nothing to tie: the model's head is its own, or "
            "neither head nor embedding are in target_modules or modules_to_save",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        add(**settings)
    assert str(caught.value) == message


def test_a_rank_beyond_the_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(devices.os, "sysconf", lambda name: 512)  # 0.25 MiB
    with pytest.raises(UserError, match=r"lora.r: adapters of rank 48 take 0.0 GiB to train, this"):
        add(r=48)


def test_peft_and_torch_errors_are_one_line(monkeypatch):
    def refuse(error):
        def raise_it(*args, **kwargs):
            raise error

        monkeypatch.setattr(peft, "get_peft_model", raise_it)

    refuse(RuntimeError("[enforce fail] not enough memory: you tried\nto allocate"))
    with pytest.raises(UserError) as caught:
        add()
    assert str(caught.value) == (
        "lora.r: the adapter could not be made: [enforce fail] not enough memory: you tried; take "
        "a smaller rank or fewer target_modules"
    )
    refuse(ValueError("Target module\n  X is not supported"))
    with pytest.raises(UserError) as caught:
        add()
    assert str(caught.value) == "lora.target_modules: Target module X is not supported"


def test_warnings_of_peft_reach_the_caller():
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        add(tiny_llama(tie_word_embeddings=True), modules_to_save=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tied = tiny_llama(tie_word_embeddings=True)
        model = add(tied, modules_to_save=["lm_head"], ensure_weight_tying=True)
    inner = model.get_base_model()
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight


def test_bias_is_trained_where_there_is_one():
    model = add(tiny_llama(attention_bias=True), bias="lora_only", target_modules=["q_proj"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(trained) == 2 and all("q_proj" in name for name in trained)


@pytest.mark.parametrize("name", ["lora_A", "weight", "train", "keys", "-x", "_", "ä", "a/b", ".."])
def test_names_that_torch_or_peft_trip_over_are_refused(name):
    with pytest.raises(ValueError, match=r"cannot name an adapter|use themselves"):
        LoraConfig(adapters={name: {}})


@pytest.mark.parametrize("name", ["a", "lora", "r", "12", "no", "x" * 64, "German-v2_final"])
def test_any_other_name_works_from_training_to_peft(tmp_path, name):
    model = add(adapters={name: {}, "other": {}}, target_modules=["q_proj"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.requires_grad else None
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    for adapter in (name, "other"):
        model.set_adapter(adapter)
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / adapter)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
