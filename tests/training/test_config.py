import pytest
from pydantic import ValidationError

from lora_engine.errors import UserError
from lora_engine.training.config import TrainConfig


def test_every_field_has_a_description():
    assert [n for n, info in TrainConfig.model_fields.items() if not info.description] == []


@pytest.mark.parametrize(
    "values",
    [
        {"max_steps": 0},
        {"epochs": 0},
        {"tokens_per_batch": 1},
        {"gradient_accumulation_steps": 0},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"schedule": "exponential"},
        {"warmup_steps": -1},
        {"warmup_ratio": 1.0},
        {"min_lr_ratio": 1.1},
        {"weight_decay": -0.1},
        {"beta1": 1.0},
        {"beta2": 1.0},
        {"eps": 0},
        {"max_grad_norm": 0},
        {"keep_checkpoints": 0},
        {"early_stopping_patience": 0, "eval_every": 1},
        {"seed": -1},
        {"seed": 2**32},
        {"lerning_rate": 1e-3},
    ],
    ids=str,
)
def test_refused(values):
    with pytest.raises(UserError):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 5, "epochs": 1}, "max_steps or epochs"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps or warmup_ratio"),
        ({"warmup_steps": 5, "max_steps": 5}, "must be less than max_steps"),
        ({"early_stopping_patience": 2}, "needs eval_every"),
    ],
)
def test_fields_that_contradict_each_other(values, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_stepz": 3}, "max_stepz: unknown key; did you mean max_steps?"),
        ({"epochs": "x"}, "epochs: expected a whole number from 1 to 10,000 or null, got 'x'"),
        ({"max_steps": 5, "epochs": 1}, "give either max_steps or epochs, not both"),
        (
            {"beta1": 2, "beta2": 2},
            "beta1: expected a number ≥ 0 and < 1, got 2 (1 more after this one)",
        ),
    ],
)
def test_an_error_is_one_line(values, message):
    with pytest.raises(UserError) as caught:
        TrainConfig(**values)
    assert str(caught.value) == f"TrainConfig: {message}"


def test_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().learning_rate = 1.0


@pytest.mark.parametrize(
    ("change", "same_run"),
    [
        ({"learning_rate": 0.5}, False),
        ({"seed": 3}, False),
        ({"tokens_per_batch": 99}, False),
        ({"max_steps": 9}, True),  # an extended run
        ({"save_every": 7}, True),
        ({"eval_every": 7}, True),
        ({"output_dir": "elsewhere"}, True),
    ],
    ids=str,
)
def test_trajectory_holds_what_decides_the_weights(change, same_run):
    assert (TrainConfig(**change).trajectory() == TrainConfig().trajectory()) is same_run


@pytest.mark.parametrize("size", ["auto", "24GB", "1.5GB", "800MB", "16GiB"])
def test_sizes_of_memory(size):
    assert TrainConfig(memory=size).memory == size


@pytest.mark.parametrize("size", ["24", "GB", "0GB", "all", "-3GB"])
def test_no_size_of_memory(size):
    with pytest.raises(UserError, match="is no size of memory; write 24GB"):
        TrainConfig(memory=size)


def test_memory_leaves_the_weights_as_they_are():
    assert TrainConfig(memory="auto").trajectory() == TrainConfig().trajectory()
