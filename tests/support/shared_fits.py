"""What the processes of a test do: fits of a tiny model, in one process or several together."""

import os
import signal
from dataclasses import replace

import peft
import torch
from objective_cases import EVERY, examples_for
from training_helpers import (
    SignalAtStep,
    accelerated,
    make_dataset,
    tiny_llama,
    tiny_lora,
    trainable,
)

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.distributed.world import current
from lora_engine.models.quantized.quantize import quantize_model
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.models.sharded.shard import shard_model
from lora_engine.training.config import TrainConfig
from lora_engine.training.trainer import Trainer

SETTINGS = {
    "max_steps": 20,
    "tokens_per_batch": 40,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "eval_every": 8,
    "preflight": False,
}


class Recorder:
    """Remembers what a run told, and acts at a step."""

    def __init__(self, at_step=None, action=None):
        self.steps, self.evals = [], []
        self.at_step, self.action = at_step, action

    def on_step(self, metrics):
        self.steps.append(metrics)
        if metrics.step == self.at_step:
            self.action()

    def on_eval(self, step, result):
        self.evals.append((step, result))


def data_for(name):
    """A set of training examples and one of held-out ones."""
    if name == "sft":
        return make_dataset(60), make_dataset(9, seed=1)
    train, held_out = examples_for(name, 40), examples_for(name, 5, seed=1)
    return TokenizedDataset(train), TokenizedDataset(held_out)


def trainer_for(folder, name="sft", *, dropout=0.0, callbacks=(), train=None, **settings):
    model = accelerated(tiny_lora(dropout=dropout, init_lora_weights=False))
    train_data, eval_data = data_for(name)
    config = TrainConfig(output_dir=folder, **{**SETTINGS, **settings})
    return Trainer(
        *(model, None, train or train_data, eval_data, config),
        objective=EVERY[name],
        callbacks=callbacks,
    )


def sharded_model(format=None, *, dropout=0.0, dora=False):
    """The tiny model with LoRA, its linears in packed bits or dense, shared by all processes."""
    model = tiny_llama()
    if format is not None:
        quantize_model(model, format)
    if current().size > 1:
        shard_model(model, current())
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules="all-linear",
        init_lora_weights=False,
        use_dora=dora,
    )
    torch.manual_seed(1)
    return accelerated(peft.get_peft_model(model, lora))


def fit_sharded(folder, formats, name="sft", **settings):
    """`fit` over shards of each of the formats, and the bytes of weights that a process keeps."""
    made = {}
    for format in formats:
        recorder = Recorder()
        model = sharded_model(format, **settings)
        train_data, eval_data = data_for(name)
        own = {**SETTINGS, "gradient_accumulation_steps": 5, "eval_every": 6, "preflight": True}
        trainer = Trainer(
            *(model, None, train_data, eval_data),
            TrainConfig(output_dir=folder / str(format), **own),
            objective=EVERY[name],
            callbacks=[recorder],
            origin={"weights": "the same"},
        )
        result = trainer.fit()
        weights = {n: values.numpy() for n, values in trainable(model).items()}
        made[format] = (result, recorder.steps, recorder.evals, weights), kept_bytes(model)
    return made


def kept_bytes(model):
    """Of the linears' weights, in this process."""
    linears = [module for module in model.modules() if isinstance(module, ShardedLinear)]
    return sum(linear.sharded.shard.nbytes for linear in linears)


def fit(folder, name="sft", *, resume=False, stop_at=None, **settings):
    """Result, steps, evaluations and final weights, as arrays, of a run."""
    recorder = Recorder()
    callbacks = [recorder] if stop_at is None else [recorder, SignalAtStep(stop_at)]
    trainer = trainer_for(folder, name, callbacks=callbacks, **settings)
    result = trainer.fit(resume=resume)
    weights = {name: values.numpy() for name, values in trainable(trainer.model).items()}
    return result, recorder.steps, recorder.evals, weights


def fit_each(folder, runs):
    """`fit` of each of the runs, by name: its objective, and its settings."""
    return {key: fit(folder / key, name, **own) for key, (name, own) in runs.items()}


def fit_and_die(folder, rank, step):
    """A run in which the process `rank` is killed after a step."""
    trainer = trainer_for(folder, dropout=0.3, save_every=2)
    take = trainer._train_source.take

    def dying(position, count):
        if current().rank == rank and dying.calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        dying.calls += 1
        return take(position, count)

    dying.calls = 0
    trainer._train_source.take = dying
    return trainer.fit()


def fit_with_a_bad_batch(folder):
    """A run in which the last process's weights turn bad at a step."""
    trainer = trainer_for(folder)
    broken = trainer.model.get_base_model().model.norm.weight
    take = trainer._train_source.take

    def breaking(position, count):
        if position.batch_index >= 8 and current().rank == current().size - 1:
            broken.data.fill_(torch.nan)
        return take(position, count)

    trainer._train_source.take = breaking
    return trainer.fit()


def fit_on_other_data(folder):
    """A run of processes of which the second has other data."""
    train, _ = data_for("sft")
    if current().rank == 1:
        first, *rest = train.examples
        train = TokenizedDataset([replace(first, origin="", supervised=[True] * len(first)), *rest])
    return trainer_for(folder, train=train).fit()
