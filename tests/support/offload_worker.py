"""Trains adapters over a model in a process that may take so much address space, and no more.

python offload_worker.py FOLDER SCRATCH MEGABYTES, with "-" for SCRATCH: the model is in memory.
Prints the losses of two steps as JSON.
"""

import json
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import lora_engine
from lora_engine.memory.checkpointing import checkpointing
from lora_engine.models.load.load import load_model
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama, with_lora
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.step import TrainStep


def losses(model, tokens):
    from lora_engine.data.batch import collate
    from lora_engine.data.render import Example

    model = with_lora(model, r=2)
    lora_engine.accelerate(model)
    flat = FlatParameters(model.train().named_parameters())
    step = TrainStep(model, SFT(), FlatAdamW(flat, TrainConfig()))
    ids = [(7 * i + 3) % 61 for i in range(tokens)]
    batch = collate([Example(ids, [False] + [True] * (tokens - 1), "made:1")])
    with checkpointing(model, "layer"):
        return [step(n, [batch], 1e-3, lambda: None).loss for n in (1, 2)]


def main():
    folder, scratch, megabytes = sys.argv[1:]
    torch.set_num_threads(1)
    losses(tiny_llama(vocab_size=61), 64)  # whatever libraries load and keep, they have now
    losses(tiny_llama(vocab_size=61, dtype=torch.bfloat16), 64)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + int(megabytes) * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    model, _ = load_model(
        folder,
        dtype=json.loads((Path(folder) / "config.json").read_text())["dtype"],
        device="cpu",
        offload_folder=None if scratch == "-" else scratch,
    )
    print(json.dumps(losses(model, 64)))


if __name__ == "__main__":
    main()
