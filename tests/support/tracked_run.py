"""A run of three steps that is told to a tracking service: `python tracked_run.py SERVICE FOLDER`.

Prints the losses of the steps, and the held-out ones, as JSON.
"""

import json
import sys
from pathlib import Path

import torch

from lora_engine import TrainConfig, Trainer
from lora_engine.testing import byte_tokenizer, tiny_llama, with_lora

RECORDS = [{"prompt": f"number {i} is", "completion": str(i)} for i in range(10)]


class Kept:
    """What a callback is told of the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.heldout: list[tuple[int, float]] = []

    def on_step(self, metrics) -> None:
        self.losses.append(metrics.loss)

    def on_eval(self, step, result) -> None:
        self.heldout.append((step, result.loss))


def main(service: str, folder: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    model = with_lora(tiny_llama(vocab_size=len(tokenizer)))
    config = TrainConfig(output_dir=folder, max_steps=3, eval_every=2, log_to=[service])
    kept = Kept()
    Trainer(model, tokenizer, RECORDS[:8], RECORDS[8:], config, callbacks=[kept]).fit()
    print(json.dumps({"train": kept.losses, "heldout": kept.heldout}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
