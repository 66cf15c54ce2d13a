"""What the processes of a test do that share the tokens of each micro-batch."""

from dataclasses import replace

import torch
from shared_fits import Recorder, data_for
from training_helpers import accelerated, trainable

from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.distributed.world import current
from lora_engine.memory.checkpointing import checkpointing
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama, with_lora
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.step import TrainStep
from lora_engine.training.trainer import Trainer


def adapted(kv_heads=4, **lora):
    model = tiny_llama(vocab_size=61, kv_heads=kv_heads, initializer_range=0.2)
    return accelerated(with_lora(model, **lora))


def example(length, supervised, seed):
    ids = torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [place in supervised for place in range(length)], f"made:{seed}")


# By what of a batch could go wrong when its tokens are in parts.
BATCHES = {
    "one sequence of odd length": [example(37, range(5, 37), 1)],
    "targets at the end alone": [example(40, range(36, 40), 2)],
    "several sequences": [example(n, range(2, n), n) for n in (3, 17, 9, 12)],
    "fewer tokens than processes": [example(3, range(1, 3), 3)],
}


def batches():
    shared = [example(8, (), 4).input_ids + example(5, (), n).input_ids for n in (5, 6, 7)]
    with_prefix = [Example(ids, [at > 8 for at in range(13)], f"made:{ids}") for ids in shared]
    made = {name: collate(examples) for name, examples in BATCHES.items()}
    return {**made, "a shared prefix": collate(with_prefix, share_prefixes=True)}


def first_steps(policy):
    """Of each of the batches loss, norm and gradient of a step, and 20 losses over all of them."""
    world = current()
    world = replace(world, in_step=True, shares_tokens=True) if world.size > 1 else world
    model = adapted().train()
    flat = FlatParameters(model.named_parameters())
    step = TrainStep(model, SFT(), FlatAdamW(flat, TrainConfig()), world=world)
    made = {}
    with checkpointing(model, policy):
        for name, batch in batches().items():
            result = step(1, [batch], 0.0, lambda: None)
            made[name] = result.loss, result.grad_norm, flat.grad.clone().numpy()
        whole = list(batches().values())
        made["losses"] = [step(n, whole, 1e-2, lambda: None).loss for n in range(1, 21)]
    return made


def fit_sequences(folder, name="sft", kv_heads=4, dropout=0.0):
    """A run whose processes share tokens: result, steps, evaluations and weights."""
    from objective_cases import EVERY

    recorder = Recorder()
    model = adapted(kv_heads, lora_dropout=dropout)
    config = TrainConfig(
        output_dir=folder,
        sequence_parallel=True,
        max_steps=20,
        tokens_per_batch=60,
        learning_rate=1e-2,
        eval_every=10,
        checkpointing="layer",
    )
    data = data_for(name)
    trainer = Trainer(model, None, *data, config, objective=EVERY[name], callbacks=[recorder])
    result = trainer.fit()
    weights = {name: values.numpy() for name, values in trainable(model).items()}
    return result, recorder.steps, recorder.evals, weights
