"""A tiny random Llama with LoRA, a tiny language that it can learn, and a Trainer for both."""

import json
import random
import signal

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.render import Example
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.training.config import TrainConfig
from lora_engine.training.run.checkpoint import CheckpointStore
from lora_engine.training.trainer import Trainer

VOCAB = 61


def tiny_llama(dtype=torch.float32, seed=0):
    """Two layers, 4 query and 2 key heads, tied head, about 20,000 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_lora(dropout=0.0, dtype=torch.float32, rank=4, autocast_adapter_dtype=True, **kwargs):
    """The same with LoRA on all linear layers; adapters are float32 if autocast."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", **kwargs
    )
    return peft.get_peft_model(
        tiny_llama(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype
    )


def make_examples(count, seed=0, longest=14) -> list[Example]:
    """Sequences in which every token follows from the one before; a prompt part unsupervised."""
    draw = random.Random(seed)
    examples = []
    for index in range(count):
        ids = [draw.randrange(VOCAB)]
        length = draw.randrange(3, longest + 1)
        while len(ids) < length:
            ids.append((ids[-1] * 5 + 7) % VOCAB)
        prompt = draw.randrange(1, length)
        supervised = [position >= prompt for position in range(length)]
        examples.append(Example(ids, supervised, f"data.jsonl:{index + 1}"))
    return examples


def make_dataset(count, seed=0) -> TokenizedDataset:
    return TokenizedDataset(make_examples(count, seed))


def one_batch(examples) -> PackedBatch:
    return collate(examples)


def rows(count=3, length=12):
    """A batch as models take it, the first row with padding on its left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def layer(model, number=1):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model.layers[number]


def oracle_loss_sum(model, examples) -> torch.Tensor:
    """Sum of token losses by transformers' own forward, one sequence at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.tensor(example.input_ids)
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        supervised = torch.tensor(example.supervised[1:])
        logprobs = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        total = total - logprobs[supervised].sum()
    return total


def count_targets(examples) -> int:
    return sum(sum(example.supervised[1:]) for example in examples)


def trainable(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


TRAIN, EVAL = make_dataset(30), make_dataset(8, seed=1)


def make_trainer(folder, model=None, train=TRAIN, held_out=EVAL, callbacks=(), **config):
    settings = {"max_steps": 6, "tokens_per_batch": 64, "learning_rate": 5e-3, **config}
    model = tiny_lora() if model is None else model
    config = TrainConfig(output_dir=folder, **settings)
    return Trainer(model, None, train, held_out, config, callbacks=callbacks)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved_steps(folder):
    return CheckpointStore(folder / "checkpoints").steps()


def accelerated(model):
    accelerate(model, strict=True)
    return model


class SignalAtStep:
    def __init__(self, step):
        self.step = step

    def on_step(self, metrics):
        if metrics.step == self.step:
            signal.raise_signal(signal.SIGTERM)
