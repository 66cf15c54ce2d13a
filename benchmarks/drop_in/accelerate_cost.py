"""What `accelerate` costs: seconds to attach, and the share of a step that looking anew takes.

    python -m benchmarks.drop_in.accelerate_cost --attach
    python -m benchmarks.drop_in.accelerate_cost --tokens 256,1024

--attach: a random Llama of 1.1 billion parameters in bfloat16, with LoRA on all linears: the first
`accelerate` of the process, the imports of lora_engine included, and the second, after `restore`.
--tokens: training steps of SmolLM2-135M in bfloat16 on one row of so many tokens, and on the demo's
batch of eight functions. Nothing of a product is remembered: before each one an accelerated model
looks at PEFT's layers and copies A and B. Both are timed within the step. Much of that time fetches
memory that the product reads next, so every such step has a neighbour that remembers what the first
step saw and copied, and so computes with stale adapters. What those take less is the cost: the mean
of all pairs but for a tenth at either end, with its standard error, in processor time, which leaves
out what other programs take of the machine, and by the clock.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import torch

from benchmarks.common import output
from benchmarks.train.train_workload import add_adapters, init_adapters, labels

STEPS = 15
TIMED_STEPS = 3
DEMO = 8  # functions a step


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attach", action="store_true", help="time accelerate() itself")
    parser.add_argument("--tokens", default="", help="lengths of rows to take steps of, by commas")
    parser.add_argument("--steps", type=int, default=STEPS, help="pairs of steps, 3 and more")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def random_llama(**sizes: int) -> Any:
    """A Llama of bfloat16 with LoRA of rank 16 on all linears, of TinyLlama's sizes or others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    of_tiny_llama = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(**{**of_tiny_llama, **sizes}))
    finally:
        torch.set_default_dtype(torch.float32)
    return add_adapters(model)


def attach_seconds(model: Any) -> dict[str, dict[str, float]]:
    """Seconds of the first and of the second `accelerate`, by the clock and of all threads."""
    found = {}
    for name in ("first", "second"):
        import lora_engine

        clock, cpu = time.perf_counter(), time.process_time()
        lora_engine.accelerate(model)
        found[name] = {"wall": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
        lora_engine.restore(model)
    return found


@contextmanager
def timed(calls: dict[str, tuple[type, str]]) -> Iterator[dict[str, float]]:
    """Within, the seconds spent in methods, by the names given to them."""
    spent = dict.fromkeys(calls, 0.0)
    before = {name: getattr(owner, method) for name, (owner, method) in calls.items()}

    def timing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for name, (owner, method) in calls.items():
        setattr(owner, method, timing(name, before[name]))
    try:
        yield spent
    finally:
        for name, (owner, method) in calls.items():
            setattr(owner, method, before[name])


class Remembering:
    """Within, groups of linears neither look nor copy: they remember what they last saw."""

    def __init__(self) -> None:
        self.fillings: dict[Any, Any] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from lora_engine.models.attach.linear_group import LinearGroup
        from lora_engine.ops.lora.group import LoraGroup

        before = LinearGroup.ready, LoraGroup.fill, LoraGroup.fill_again

        def fill(group: Any, kernels: Any) -> Any:
            if group not in self.fillings:
                self.fillings[group] = before[1](group, kernels)
            return self.fillings[group]

        replaced: Any = (lambda group, x: True, fill, lambda group, filling, kernels: None)
        LinearGroup.ready, LoraGroup.fill, LoraGroup.fill_again = replaced  # type: ignore[method-assign]
        try:
            yield
        finally:
            LinearGroup.ready, LoraGroup.fill, LoraGroup.fill_again = before  # type: ignore[method-assign]


class Seconds(NamedTuple):
    """What a step takes."""

    wall: float
    cpu: float  # of all threads


class Cost(NamedTuple):
    """A share of a step, and its standard error."""

    share: float
    error: float


def step_shares(model: Any, batch: dict[str, torch.Tensor], steps: int) -> dict[str, Any]:
    """Of `steps` pairs of training steps, one that looks and copies, one that remembers.

    step, look, copy: seconds of the former, and within it, medians. wall, cpu: what it costs.
    """
    from lora_engine.models.attach.linear_group import LinearGroup
    from lora_engine.ops.lora.group import LoraGroup

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    remembering = Remembering()
    calls = {
        "look": (LinearGroup, "ready"),
        "fill": (LoraGroup, "fill"),
        "again": (LoraGroup, "fill_again"),
    }

    def step() -> Seconds:
        wall, cpu = time.perf_counter(), time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)

    def remembering_step() -> Seconds:
        with remembering():
            return step()

    def timed_step() -> dict[str, float]:
        with timed(calls) as spent:
            step()
            return spent

    step(), remembering_step()
    # The clocks within a step take time as well: such steps are no part of a pair.
    within = [timed_step() for _ in range(TIMED_STEPS)]
    pairs = []
    for i in range(steps):
        if i % 2:
            less, whole = remembering_step(), step()
        else:
            whole, less = step(), remembering_step()
        pairs.append((whole, less))
    return {
        "step": median(whole.wall for whole, _ in pairs),
        "look": median(spent["look"] for spent in within),
        "copy": median(spent["fill"] + spent["again"] for spent in within),
        "wall": cost([(whole.wall, less.wall) for whole, less in pairs]),
        "cpu": cost([(whole.cpu, less.cpu) for whole, less in pairs]),
    }


def cost(pairs: Sequence[tuple[float, float]]) -> Cost:
    """What the former of each pair takes more, as a share of their median."""
    more = sorted(whole - less for whole, less in pairs)
    cut = len(more) // 10
    kept = more[cut : len(more) - cut]
    step = median(whole for whole, _ in pairs)
    return Cost(mean(kept) / step, stdev(kept) / len(kept) ** 0.5 / step)


def demo_batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Functions and their docstrings, padded on the right."""
    from lora_engine.data.docstrings import docstring_records
    from lora_engine.data.render import tokenize

    records = random.Random(0).sample(docstring_records(), DEMO)
    examples = [tokenize(record, tokenizer, max_length=512) for record in records]
    longest = max(map(len, examples))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded([list(e.input_ids) for e in examples], 0),
        "attention_mask": padded([[1] * len(e) for e in examples], 0),
        "labels": padded(list(map(labels, examples)), -100),
    }


def steps_of_smollm2(lengths: Sequence[int], steps: int) -> dict[str, dict[str, Any]]:
    """`step_shares` by batch."""
    import lora_engine

    model, tokenizer = lora_engine.load_model("smollm2", dtype=torch.bfloat16, device="cpu")
    model = add_adapters(model)
    init_adapters(model, 0)
    lora_engine.accelerate(model.train())
    batches = {}
    for length in lengths:
        ids = torch.arange(length)[None] % 1000 + 100
        batches[f"{length} tokens"] = {"input_ids": ids, "labels": ids}
    demo = demo_batch(tokenizer)
    batches[f"the demo's, {int(demo['attention_mask'].sum())} tokens"] = demo
    return {name: step_shares(model, batch, steps) for name, batch in batches.items()}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    run = output.context()
    result: dict[str, Any] = {"run": run}
    parts = [output.header(run)]
    if args.attach:
        result["attach"] = attached = attach_seconds(random_llama())
        rows = [[name, *(f"{s:.2f}" for s in each.values())] for name, each in attached.items()]
        parts.append(output.table(("accelerate", "seconds", "CPU seconds"), rows))
    if args.tokens:
        lengths = [int(length) for length in args.tokens.split(",")]
        result["steps"] = steps = steps_of_smollm2(lengths, args.steps)
        rows = []
        for name, found in steps.items():
            ms = (f"{1e3 * found[key]:.1f}" for key in ("step", "look", "copy"))
            costs = (found[key] for key in ("cpu", "wall"))
            rows.append([name, *ms, *(f"{100 * c.share:.1f} ± {100 * c.error:.1f}" for c in costs)])
        columns = (
            "batch",
            "step ms",
            "looking ms",
            "copying ms",
            "cost in processor time %",
            "by the clock %",
        )
        parts.append(output.table(columns, rows))
    text = "\n\n".join(parts)
    print(text)
    if args.out is not None:
        output.write(args.out, result, text)


if __name__ == "__main__":
    main()
