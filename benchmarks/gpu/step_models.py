"""The job of train_step.py: models of random weights made on the device, and batches for them."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.train_flops import ModelShape
from lora_engine.data.render import Example

RANK, ALPHA = 16, 32
LORA_B_STD = 0.02  # with B = 0 the first gradient of A is zero
MODELS = {
    "tiny": ModelShape(2, 64, 96, 4, 2, 16, 512),
    "llama-1b": ModelShape(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen3-0.6b": ModelShape(28, 1024, 3072, 16, 8, 128, 151936),
}
# Tokens of each sequence of a batch. "mixed" adds up to as many as "rows".
BATCHES = {
    "rows": (2048,) * 4,
    "mixed": (2048, 1731, 1180, 903, 640, 512, 397, 301, 220, 130, 80, 50),
    "tiny": (12,) * 3,
    "host": (64,) * 4,  # so few that the GPU waits for the host
    "tiny-mixed": (17, 9, 6, 4),
}


def config_of(name: str) -> Any:
    """transformers' configuration of one of MODELS."""
    import transformers

    shape = MODELS[name]
    sizes = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": name not in ("llama-8b", "tiny"),
        "use_cache": False,
    }
    if name.startswith("qwen3"):
        return transformers.Qwen3Config(**sizes, rope_theta=1e6)
    return transformers.LlamaConfig(**sizes, rope_theta=5e5)


def make_model(name: str, device: torch.device) -> Any:
    """The model in bfloat16 with random weights, drawn on the device, and sdpa."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config_of(name), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.to(device)  # what a model makes elsewhere on purpose, such as inv_freq


def add_adapters(model: Any) -> Any:
    """LoRA on all linears but the head, in float32 as PEFT makes it, A and B random."""
    import peft

    device = next(model.parameters()).device
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    torch.manual_seed(0)
    with torch.device(device):
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=LORA_B_STD)
    return model


class Snapshot:
    """The trained parameters as they were, for the next contender to begin with."""

    def __init__(self, model: nn.Module) -> None:
        named = model.named_parameters()
        self.values = {n: p.detach().clone() for n, p in named if p.requires_grad}

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    def restore(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Puts the values back, in `dtype` if they are to have another than their own."""
        for name, parameter in model.named_parameters():
            value = self.values.get(name)
            if value is None:
                continue
            target = value.dtype if dtype is None else dtype
            if parameter.dtype != target:
                parameter.data = value.to(target, copy=True)
            else:
                parameter.data.copy_(value)
            parameter.grad = None


@dataclass(frozen=True)
class Batch:
    """One batch in the forms that contenders take.

    rows: equal sequences as [B, L]; None where lengths differ.
    packed: all in one row, with positions that begin anew. padded: to the longest, with a mask.
    """

    lengths: tuple[int, ...]
    examples: tuple[Example, ...]
    rows: dict[str, Tensor] | None
    packed: dict[str, Tensor]
    padded: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def targets(self) -> int:
        """Every token but a sequence's first is predicted."""
        return self.tokens - len(self.lengths)


def make_batch(name: str, vocab: int, device: torch.device) -> Batch:
    """One of BATCHES, random tokens of which all are supervised."""
    lengths = BATCHES[name]
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]
    examples = tuple(
        Example(ids.tolist(), [True] * len(ids), f"row:{i}") for i, ids in enumerate(sequences)
    )
    flat = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {
        "input_ids": flat,
        "position_ids": positions,
        "labels": flat.masked_fill(positions == 0, -100),
    }
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=0)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    padded = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }
    rows = None
    if len(set(lengths)) == 1:
        rows = {"input_ids": ids, "labels": ids.clone()}
    on_device = [
        None if x is None else {key: tensor.to(device) for key, tensor in x.items()}
        for x in (rows, packed, padded)
    ]
    return Batch(lengths, examples, *on_device)  # type: ignore[arg-type]


def facts(model: str, batch: Batch) -> dict[str, Any]:
    """The job as JSON values."""
    return {
        "shape": asdict(MODELS[model]),
        "rank": RANK,
        "lengths": list(batch.lengths),
        "tokens": batch.tokens,
        "targets": batch.targets,
    }
