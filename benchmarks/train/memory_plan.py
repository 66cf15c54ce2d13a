"""The planner's peak of a training step beside the one that torch's allocator counted, on the CPU.

    python -m benchmarks.train.memory_plan --out benchmarks/results/memory_plan

Each case is a random model with adapters, accelerated, and an optimiser step. `counted` is the most
bytes of tensors alive during the step, the model's included; `step` leaves out what is alive
between steps, on both sides.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import output

SMOL = {"hidden": 576, "inner": 1536, "layers": 6, "heads": 9, "kv": 3, "vocab": 49152}
SMALL = {"hidden": 512, "inner": 1408, "layers": 4, "heads": 8, "kv": 4, "vocab": 32000}
# What differs from: 6 layers of SmolLM2-135M's extents, bfloat16, LoRA of rank 16, 512 tokens, all
# supervised.
CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "float32": {"dtype": "float32"},
    "2048 tokens, a third supervised": {"tokens": 2048, "share": 0.33},
    "256 tokens": {"tokens": 256},
    "rank 128": {"r": 128},
    "dropout": {"dropout": 0.1},
    "nf4": {"quantize": "nf4"},
    "8-bit AdamW, head trained": {"optimizer": "adamw_8bit", "save": ["lm_head"], "tied": False},
    "layer": {"policy": "layer"},
    "half": {"policy": "half"},
    "selective": {"policy": "selective"},
    "every_2": {"policy": "every_2"},
    "layer, nf4, 2048 tokens": {"policy": "layer", "quantize": "nf4", "tokens": 2048},
    "small model": {"model": SMALL},
    "small model, 4096 tokens, half": {"model": SMALL, "tokens": 4096, "policy": "half"},
    "small Qwen3 with head norms": {"model": {**SMALL, "qwen3": True}},
    "small model, all weights": {"model": SMALL, "full": True},
    "small model, all weights, layer, 8-bit": {
        "model": SMALL,
        "full": True,
        "policy": "layer",
        "optimizer": "adamw_8bit",
    },
}
ALLOWED = 0.07


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", help="comma-separated; all if not given")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def random_model(case: dict[str, Any]) -> Any:
    import torch
    import transformers

    size = case.get("model", SMOL)
    options = {
        "vocab_size": size["vocab"],
        "hidden_size": size["hidden"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "head_dim": 64,
        "tie_word_embeddings": case.get("tied", True),
        "max_position_embeddings": 8192,
    }
    kind = "Qwen3" if size.get("qwen3") else "Llama"
    config = getattr(transformers, f"{kind}Config")(**options)
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    torch.set_default_dtype(torch.float32)
    return model


def lora_of(case: dict[str, Any]) -> Any:
    from lora_engine.models.peft.adapters import LoraConfig

    if case.get("full"):
        return None
    return LoraConfig(
        r=case.get("r", 16),
        dropout=case.get("dropout", 0.0),
        modules_to_save=case.get("save"),
    )


def run_one(name: str) -> dict[str, Any]:
    """A case's bytes: predicted and measured."""
    import gc
    import random

    import torch

    import lora_engine
    from lora_engine.data.batch import collate
    from lora_engine.data.render import Example
    from lora_engine.memory.checkpointing import checkpointing
    from lora_engine.memory.measured import peak_cpu_bytes
    from lora_engine.memory.policy import policy_of
    from lora_engine.memory.sizes import Storing, sizes_of
    from lora_engine.memory.timeline import Load, peak, timeline
    from lora_engine.models.peft.adapters import add_adapters
    from lora_engine.models.quantized.quantize import quantize_model
    from lora_engine.objectives.sft import SFT
    from lora_engine.quantization.formats import writable_format
    from lora_engine.training.config import TrainConfig
    from lora_engine.training.optimizer.adamw import FlatAdamW
    from lora_engine.training.optimizer.flat import FlatParameters
    from lora_engine.training.step import TrainStep

    case = CASES[name]
    others = bytes_alive()
    tokens, share = case.get("tokens", 512), case.get("share", 1.0)
    draw = random.Random(0)
    lengths = [tokens // 4] * 4
    examples = []
    for length in lengths:
        supervised = [at >= (1 - share) * length for at in range(length)]
        ids = [draw.randrange(256) for _ in range(length)]
        examples.append(Example(ids, supervised, "made"))
    batch = collate(examples)
    policy = case.get("policy", "none")
    optimizer = case.get("optimizer", "adamw")
    held: dict[str, Any] = {}

    def prepare() -> None:
        model = random_model(case)
        if case.get("quantize"):
            quantize_model(model, case["quantize"])
        if not case.get("full"):
            model = add_adapters(model, lora_of(case))
        model.train()
        lora_engine.accelerate(model)
        flat = FlatParameters(model.named_parameters())
        train = TrainConfig(optimizer=optimizer, learning_rate=1e-4)
        held["step"] = TrainStep(model, SFT(), FlatAdamW(flat, train))
        held["model"] = model

    def steps() -> None:
        with checkpointing(held["model"], policy):
            held["step"](1, [batch], 1e-4, lambda: None)

    with torch.device("meta"):
        empty = random_model(case)
    format = writable_format(case["quantize"], None, False) if case.get("quantize") else None
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    sizes = sizes_of(empty, lora_of(case), dtype, Storing(format))
    load = Load(batch.num_rows, batch.num_targets, policy_of(policy), optimizer)
    moments = [m for m in timeline(sizes, load) if m.name not in ("evaluation", "checkpoint")]
    highest = peak(moments)
    between = next(m for m in moments if m.name == "optimiser").total

    prepare()
    steps()
    alive = bytes_alive() - others
    held.clear()
    gc.collect()
    counted = peak_cpu_bytes(steps, prepare)
    return {
        "case": name,
        "counted": counted,
        "predicted": highest.total,
        "counted_step": counted - alive,
        "predicted_step": highest.total - between,
        "counted_between": alive,
        "predicted_between": between,
        "at": highest.name,
    }


def bytes_alive() -> int:
    """Of the tensors there are, each storage once."""
    import gc

    import torch

    gc.collect()
    alive = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
    sizes = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in alive
        if x.device.type == "cpu" and x.layout == torch.strided
    }
    return sum(sizes.values())


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    names = args.cases.split(",") if args.cases else list(CASES)
    result: dict[str, Any] = {"context": output.context(), "rows": []}
    for name in names:
        result["rows"].append(run_one(name))
        if args.out is not None:
            output.write(args.out, result, report(result))
        print(name, flush=True)
    print(report(result))
    return 0 if all(abs(off(row, "")) <= ALLOWED for row in result["rows"]) else 1


def off(row: dict[str, Any], what: str) -> float:
    """Of the predicted bytes from those counted, as a share."""
    return float(row[f"predicted{what}"] / row[f"counted{what}"] - 1)


def report(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        line = [row["case"]]
        for what in ("", "_step"):
            sizes = row[f"counted{what}"], row[f"predicted{what}"]
            line += [*(f"{size / 1e6:,.1f}" for size in sizes), f"{off(row, what):+.1%}"]
        lines.append(line)
    columns = [
        "case",
        "counted MB",
        "predicted",
        "off",
        "step MB",
        "predicted",
        "off",
    ]
    title = "Peak of a training step: predicted from sizes, and counted by torch's allocator"
    return "\n\n".join([title, output.table(columns, lines), output.header(result["context"])])


if __name__ == "__main__":
    sys.exit(main())
