"""What a resumed run has to share with its checkpoint, and how it is told what differs."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from training_helpers import tiny_llama, tiny_lora

from lora_engine.errors import UserError
from lora_engine.objectives.sft import SFT
from lora_engine.training.run.identity import (
    check_identity,
    model_weights_sha256,
    run_identity,
    tell_rounding,
)

SETTINGS = {"learning_rate": 0.005, "seed": 0}
DATA = {"training data": "aa", "held-out data": None}


def tokenizer(words=("a", "b"), template="{{ messages }}"):
    vocabulary = {word: index for index, word in enumerate(words)}
    return SimpleNamespace(
        get_vocab=lambda: vocabulary, special_tokens_map={}, chat_template=template
    )


def identity(model=None, tokenizer=tokenizer(), settings=SETTINGS, data=DATA, origin=None):  # noqa: B008
    return run_identity(model or tiny_lora(), tokenizer, settings, SFT(), data, origin)


def scaled(model, names, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.mul_(factor)
    return model


def with_config(**values):
    model = tiny_lora()
    for name, value in values.items():
        setattr(model.config, name, value)
    return model


def lora(**changes):
    return lambda: {"model": tiny_lora(**changes)}


def narrow_lora():
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    return peft.get_peft_model(tiny_llama(), config)


CHANGES = {
    "setting": (
        lambda: {"settings": {**SETTINGS, "seed": 3}},
        "made with seed=0, now seed=3: change it back to continue, or choose another output_dir",
    ),
    "rank": (lora(rank=3), r"r=4, now r=3 \(adapter default\)"),
    "dropout": (lora(dropout=0.5), r"lora_dropout=0.0, now lora_dropout=0.5 \(adapter default\)"),
    "rslora": (lora(use_rslora=True), "use_rslora=False, now use_rslora=True"),
    "dora": (lora(use_dora=True), "use_dora=False, now use_dora=True"),
    "bias": (lora(bias="lora_only"), "bias=none, now bias=lora_only"),
    "initial values": (lora(init_lora_weights=False), "init_lora_weights=True, now init"),
    "left out": (lora(exclude_modules=["v_proj"]), r"exclude_modules=None, now .*=\['v_proj'\]"),
    "targets": (
        lambda: {"model": narrow_lora()},
        r"target_modules=\['model.layers.*, now target_modules=\['q_proj'\]",
    ),
    "saved modules": (lora(modules_to_save=["lm_head"]), "modules_to_save=None, now .*lm_head"),
    "ranks": (lora(rank_pattern={"q_proj": 2}), "rank_pattern={}, now rank_pattern={'q_proj': 2}"),
    "no adapter": (lambda: {"model": tiny_llama()}, "made with adapter default, now without;"),
    "base": (
        lambda: {"model": scaled(tiny_lora(), "v_proj.base", 1.5)},
        "made with other model weights",
    ),
    "number format": (
        lambda: {"model": tiny_lora(dtype=torch.bfloat16)},
        r"dtype=float32, now dtype=bfloat16, float32 \(model\)",
    ),
    "model's settings": (
        lambda: {"model": with_config(rms_norm_eps=0.1)},
        r"rms_norm_eps=1e-06, now rms_norm_eps=0.1 \(model's config\)",
    ),
    "positions": (
        lambda: {"model": with_config(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})},
        "rope_parameters=.*10000.0.*now rope_parameters=.*5.0",
    ),
    "origin": (
        lambda: {"origin": {"lora.seed": 1}},
        r"lora.seed=None, now lora.seed=1 \(model\)",
    ),
    "vocabulary": (
        lambda: {"tokenizer": tokenizer(("a", "c"))},
        "made with another vocabulary of the tokenizer",
    ),
    "template": (lambda: {"tokenizer": tokenizer(template="")}, "made with another chat template"),
    "data": (
        lambda: {"data": {**DATA, "training data": "bb"}},
        "made with other training data",
    ),
    "held-out data": (
        lambda: {"data": {**DATA, "held-out data": "bb"}},
        "made with other held-out data",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_differs_is_named(change, message):
    before, now = json.loads(json.dumps(identity(), allow_nan=False)), identity(**change())
    with pytest.raises(UserError, match=f"here: .*{message}") as caught:
        check_identity("here", before, now)
    assert "\n" not in str(caught.value)


def test_the_same_run_is_the_same():
    saved = json.loads(json.dumps(identity()))
    check_identity("here", saved, identity())
    trained = scaled(tiny_lora(), "lora_", 3.0)
    check_identity("here", saved, identity(trained))
    trained.config.use_cache = False
    trained.config._name_or_path = "moved"
    trained.peft_config["default"].base_model_name_or_path = "moved"
    check_identity("here", saved, identity(trained))


def test_fields_that_other_versions_of_the_libraries_have_do_not_count():
    saved = identity()
    saved["adapter default"]["invented_later"] = True
    saved["model's config"]["invented_later"] = True
    del saved["adapter default"]["lora_bias"]
    check_identity("here", saved, identity())
    saved["settings"]["invented_later"] = True
    with pytest.raises(UserError, match="invented_later"):
        check_identity("here", saved, identity())


def test_infinity_in_a_model_config_can_be_saved():
    json.dumps(identity(with_config(time_step_limit=[0.0, float("inf")])), allow_nan=False)


def test_many_differences_are_counted():
    now = identity(tiny_lora(rank=2, dropout=0.1, use_rslora=True, bias="all"), settings={})
    with pytest.raises(UserError, match=r"learning_rate=0.005, .*; .*; .*; and 3 more: change"):
        check_identity("here", identity(), now)


def test_other_weights_come_with_the_models_names():
    first, second = tiny_lora(), scaled(tiny_lora(), "mlp", 2.0)
    first.config._name_or_path, second.config._name_or_path = "models/a", "models/b"
    with pytest.raises(UserError, match=r"other model weights \(models/a, now models/b\)"):
        check_identity("here", identity(first), identity(second))


def test_given_weights_stand_for_all_of_the_model():
    before, after = (
        {"origin": {"weights": model_weights_sha256(model)}}
        for model in (tiny_llama(), scaled(tiny_llama(), "norm", 1.5))
    )
    model = tiny_llama()  # all of it trained
    check_identity("here", identity(model), identity(scaled(tiny_llama(), "norm", 1.5)))
    with pytest.raises(UserError, match="other model weights"):
        check_identity("here", identity(model, **before), identity(model, **after))


def test_rounding_is_told_of(caplog):
    cpu = {"device": "cpu", "accelerated": True}
    tell_rounding(cpu, dict(cpu))
    assert caplog.messages == []
    tell_rounding(cpu, {**cpu, "device": "cuda"})
    assert caplog.messages == [
        "the same run, but for rounding: made with device=cpu, now device=cuda"
    ]
