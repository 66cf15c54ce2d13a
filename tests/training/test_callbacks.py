"""Who is told of a run, and what is no callback."""

import sys

import pytest
from training_helpers import EVAL, TRAIN, tiny_lora

from lora_engine import TrainConfig, Trainer, UserError
from lora_engine.training.callbacks import Callbacks


class OnStep:
    def __init__(self):
        self.steps = []

    def on_step(self, metrics):
        self.steps.append(metrics)


class Switched(OnStep):
    """A subclass that gives a method up."""

    on_step = None

    def on_end(self, result):
        self.steps.append(result)


def test_none_in_a_methods_place_is_no_method():
    given = Switched()
    callbacks = Callbacks([given, first := OnStep(), second := OnStep()])
    callbacks.on_step("step")
    callbacks.on_end("end")
    assert (given.steps, first.steps, second.steps) == (["end"], ["step"], ["step"])


class Stranger:
    def on_step_end(self, args, state, control):
        raise AssertionError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([OnStep], r"callback OnStep is a class; give an object of it, OnStep\(\)"),
        ([Stranger()], "callback Stranger has no method on_start, on_step, on_eval or on_end"),
        ([print], "callback builtin_function_or_method has no method"),
        ([None], "callback NoneType has no method"),
        (OnStep(), "callbacks is OnStep; give a list"),
        (None, "callbacks is NoneType; give a list"),
        ("ab", "callbacks is str; give a list"),
    ],
)
def test_what_would_never_be_called_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Callbacks(given)


def test_static_methods_of_a_class_are_called():
    told = []

    class Told:
        @staticmethod
        def on_step(metrics):
            told.append(metrics)

    Callbacks([Told]).on_step(1)
    assert told == [1]


def test_a_callback_that_ends_the_process_ends_a_run_that_is_saved(tmp_path):
    class Exit:
        def on_step(self, metrics):
            if metrics.step == 2:
                sys.exit(3)

    config = TrainConfig(output_dir=tmp_path, max_steps=4, tokens_per_batch=64)
    trainer = Trainer(tiny_lora(), None, TRAIN, EVAL, config, callbacks=[Exit()])
    with pytest.raises(SystemExit):
        trainer.fit()
    assert trainer.folder.checkpoints.latest() == 2
