"""Parameters that are trained by patterns of their names; the others stay as they are."""

import pytest
import torch
from pydantic import ValidationError
from training_helpers import make_trainer, tiny_llama, tiny_lora

import lora_engine
from lora_engine.app.config import RunConfig
from lora_engine.errors import UserError
from lora_engine.training.config import TrainConfig
from lora_engine.training.trainable import train_only, trained_names


def fitted(folder, patterns, *, accelerate=False):
    """Which parameters a short run changed, and how many were left to change."""
    model = tiny_llama()
    if accelerate:  # layers that are frozen whole run as the engine's halves
        train_only(model, patterns)
        assert "attention and MLP, each one function" in str(lora_engine.accelerate(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(folder, model, max_steps=3, trainable=patterns).fit()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}, before


@pytest.mark.parametrize("accelerate", [False, True])
def test_only_what_a_pattern_is_found_in_changes(tmp_path, accelerate):
    changed, before = fitted(
        tmp_path, [r"layers\.1\.mlp", r"\.norm\.weight$"], accelerate=accelerate
    )
    expected = {name for name in before if "layers.1.mlp" in name or name == "model.norm.weight"}
    assert changed == expected and len(expected) == 4


def test_a_tied_weight_is_trained_by_either_name(tmp_path):
    assert fitted(tmp_path / "head", ["lm_head"])[0] == {"model.embed_tokens.weight"}
    assert fitted(tmp_path / "embedding", ["embed"])[0] == {"model.embed_tokens.weight"}


def test_names_of_several_patterns_add_up():
    names = trained_names(tiny_llama(), ["q_proj", r"layers\.0\.self_attn\.[kv]_proj"])
    assert len(names) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_prj", r"'q_prj' is found in no parameter's name; did you mean q_proj\?"),
        ("(", r"'\(' is no regular expression: missing \)"),
        ("zzz", r"the first is model.embed_tokens.weight"),
    ],
)
def test_a_pattern_that_is_wrong_is_named(pattern, message):
    with pytest.raises(UserError, match=rf"^train.trainable: .*{message}"):
        trained_names(tiny_llama(), [pattern])


def test_adapters_are_trained_by_themselves(tmp_path):
    with pytest.raises(UserError, match=r"^train.trainable: the model has adapters"):
        make_trainer(tmp_path, tiny_lora(), trainable=["q_proj"])
    content = {"model": {"path": "smollm2"}, "data": {"train": "docstrings"}}
    train = {"trainable": ["q_proj"]}
    with pytest.raises(
        ValidationError, match=r"train.trainable: is for training without an adapter"
    ):
        RunConfig.model_validate({**content, "train": train})
    assert RunConfig.model_validate({**content, "train": train, "lora": None}).train.trainable


def test_it_decides_the_weights_and_may_not_be_empty():
    assert TrainConfig(trainable=("a",)).trajectory() != TrainConfig().trajectory()
    with pytest.raises(UserError):
        TrainConfig(trainable=())
