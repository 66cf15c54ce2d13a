"""The job that every contender does: the same model, adapters and batches.

It is prepared once, in a folder, and read by each contender's process.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.train.train_flops import ModelShape, Piece
from lora_engine.data.docstrings import docstring_records
from lora_engine.data.prefixes import shared_segments
from lora_engine.data.render import Example, tokenize
from lora_engine.errors import UserError

MODEL = "smollm2"
RANK, ALPHA = 16, 32
LEARNING_RATE = 2e-4
MAX_LENGTH = 512  # tokens of one example, as in the demo
LORA_B_STD = 0.02


@dataclass(frozen=True)
class Workload:
    """model: what load_model takes. shape: its sizes. batches: lists of tokenised examples.
    adapters: file with the initial adapter weights. device: "cpu" or "cuda"."""

    model: str
    shape: ModelShape
    batches: list[list[Example]]
    adapters: Path
    device: str = "cpu"

    def lengths(self) -> list[list[int]]:
        """Tokens of every example, per batch."""
        return [[len(example) for example in batch] for batch in self.batches]

    def pieces(self) -> list[list[Piece]]:
        """Per batch the sequences that remain where common beginnings are shared."""
        found = []
        for batch in self.batches:
            tokens = [np.asarray(example.input_ids) for example in batch]
            found.append([(s.start, s.end - s.start) for s in shared_segments(tokens)])
        return found

    def targets(self) -> list[int]:
        """Supervised tokens per batch."""
        return [sum(example.num_targets for example in batch) for batch in self.batches]


def prepare(
    folder: Path, *, batches: int, batch_size: int, seed: int, model_source: str = MODEL
) -> Any:
    """Draw examples from the demo's data, tokenise them, and draw initial adapters.

    Returns the model, float32, with its adapters.
    """
    from lora_engine import load_model

    everything = docstring_records()
    check_enough(batches * batch_size, len(everything), "batch_size or prompts, steps, warmup")
    model, tokenizer = load_model(model_source, dtype="float32", device="cpu")
    records = random.Random(seed).sample(everything, batches * batch_size)
    examples = [asdict(tokenize(r, tokenizer, max_length=MAX_LENGTH)) for r in records]
    shape = ModelShape.of(model.config)
    model = add_adapters(model)
    init_adapters(model, seed)
    save_adapters(model, folder / "adapters.safetensors")
    drawn = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    job = {"model": model_source, "shape": asdict(shape), "batches": drawn}
    (folder / "job.json").write_text(json.dumps(job))
    return model


def check_enough(wanted: int, there: int, settings: str) -> None:
    """UserError if a job wants more examples than there are; settings: that say how many."""
    if wanted > there:
        raise UserError(f"{wanted} examples are wanted, there are {there}; lower {settings}")


def load(folder: Path, device: str = "cpu") -> Workload:
    """What `prepare` wrote to `folder`, for a device."""
    job = json.loads((folder / "job.json").read_text())
    batches = [[Example(**example) for example in batch] for batch in job["batches"]]
    shape = ModelShape(**job["shape"])
    return Workload(job["model"], shape, batches, folder / "adapters.safetensors", device)


def add_adapters(model: Any, *, float32_adapters: bool = True) -> Any:
    """LoRA on all linear layers; adapters in float32 (PEFT's default) or in the model's dtype."""
    import peft

    return peft.get_peft_model(model, lora_config(), autocast_adapter_dtype=float32_adapters)


def lora_config() -> Any:
    """PEFT's, as every contender trains it."""
    import peft

    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")


def init_adapters(model: Any, seed: int) -> None:
    """Random A as PEFT draws it, and random B: with B = 0 the first gradient of A is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif "lora_B" in name:
                parameter.normal_(0.0, LORA_B_STD, generator=generator)


def save_adapters(model: Any, path: Path) -> None:
    """The adapter's weights, under PEFT's names."""
    import peft
    from safetensors.torch import save_file

    state = peft.get_peft_model_state_dict(model)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def load_with_adapters(
    workload: Workload, dtype: torch.dtype, *, float32_adapters: bool = True
) -> tuple[Any, Any]:
    """The workload's model in `dtype` with its initial adapters, and its tokenizer."""
    from lora_engine import load_model

    model, tokenizer = load_model(workload.model, dtype=dtype, device=workload.device)
    model = add_adapters(model, float32_adapters=float32_adapters)
    load_adapters(model, workload.adapters)
    return model, tokenizer


def load_adapters(model: Any, path: Path) -> None:
    """Put the weights of `save_adapters` into `model`. Raises RuntimeError if names differ."""
    import peft
    from safetensors.torch import load_file

    state = load_file(path)
    expected = set(peft.get_peft_model_state_dict(model))
    if set(state) != expected:
        raise RuntimeError(f"{path}: {len(expected ^ set(state))} names differ from the model's")
    peft.set_peft_model_state_dict(model, state)


def labels(example: Example) -> list[int]:
    """The token ids that transformers takes as labels, -100 where there is nothing to learn."""
    return [
        token if supervised else -100
        for token, supervised in zip(example.input_ids, example.supervised, strict=True)
    ]
