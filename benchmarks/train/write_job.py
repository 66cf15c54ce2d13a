"""Writing text beside transformers' generate: `lora-engine bench generate`.

Prompts of docstring examples, the adapter in place, always the most likely token, the same number
of new tokens for every prompt whatever ends a turn. A step writes to a batch of prompts that no
step before has seen, reading them included.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks.common import measure
from benchmarks.common.jobs import COMMON, Facts, Job, Options
from benchmarks.common.steps import Result, Stopwatch, repeated
from benchmarks.train import train_workload

Tokens: TypeAlias = Sequence[Sequence[int]]  # by prompt
Writer: TypeAlias = Callable[[Tokens], Tokens]
NEAR = 0.1
CONTENDERS = {
    "ours": "lora_engine's Generator on the accelerated model, all prompts at once",
    "transformers": "generate on the PEFT model, sdpa, a growing cache, prompts padded on the left",
    "transformers-static": "the same with cache_implementation='static', its decoding compiled",
    "transformers-merged": "as transformers, the adapter merged into the weights beforehand",
}


def prompts(folder: Path) -> list[list[list[int]]]:
    """The tokens of each prompt, by step: an example without what is supervised."""
    workload = train_workload.load(folder)
    counts = [[len(e) - e.num_targets for e in batch] for batch in workload.batches]
    return [
        [example.input_ids[:count] for example, count in zip(batch, own, strict=True)]
        for batch, own in zip(workload.batches, counts, strict=True)
    ]


def prepare(folder: Path, options: Options) -> Facts:
    count = options["warmup"] + options["steps"]
    train_workload.prepare(
        folder,
        batches=count,
        batch_size=options["prompts"],
        seed=options["seed"],
        model_source=options["model"],
    )
    read = sum(len(ids) for step in prompts(folder) for ids in step) / count
    written = options["prompts"] * options["tokens"]
    return {
        "unit": "tokens/s",
        "amounts": {"": [written] * count},
        "expected": {"": 1.0},
        "text": f"{options['model']} with LoRA of rank {train_workload.RANK}, {options['dtype']}, "
        f"{options['prompts']} prompts a step of {read:.0f} tokens together, {options['tokens']} "
        "new tokens for each; rates count what is written.",
    }


def run(folder: Path, options: Options, name: str) -> Result:
    workload = train_workload.load(folder, options["device"])
    device, dtype = torch.device(workload.device), getattr(torch, options["dtype"])
    model, tokenizer = train_workload.load_with_adapters(
        workload, dtype, float32_adapters=name == "ours"
    )
    steps, count = prompts(folder), options["tokens"]
    loaded = measure.held_bytes(device)
    if name == "ours":
        write = our_writer(model, count)
    else:
        if name == "transformers-merged":
            model = model.merge_and_unload()
        static = name == "transformers-static"
        write = generate_writer(model, tokenizer.pad_token_id or 0, count, static=static)
    written: list[Tokens] = []

    def step(number: int) -> float:
        written.append(write(steps[number]))
        return 0.0

    watch = Stopwatch(device)
    result = watch.result(name, watch.watch(repeated(step, len(steps))), loaded)
    right = likely_share(workload, steps[0], written[0])
    return replace(result, steps=[replace(each, loss=right) for each in result.steps])


def our_writer(model: Any, count: int) -> Writer:
    import lora_engine
    from lora_engine.evaluation.modes import inference
    from lora_engine.generation.engine import Generator, Request
    from lora_engine.generation.sampling import Sampling

    lora_engine.accelerate(model, strict=True)
    sampling = Sampling(max_new_tokens=count, temperature=0.0, stop_tokens=())

    def write(prompts: Tokens) -> Tokens:
        with inference(model):
            generator = Generator(model, max_batch=len(prompts))
            completions = generator.run([Request(tuple(ids), sampling) for ids in prompts])
        return [one.token_ids for (one,) in completions]

    return write


def generate_writer(model: Any, pad: int, count: int, *, static: bool) -> Writer:
    """By transformers' generate."""
    from transformers import GenerationConfig

    model.eval()
    options: dict[str, Any] = {"cache_implementation": "static"} if static else {}

    def write(prompts: Tokens) -> Tokens:
        longest = max(map(len, prompts))
        rows = [[pad] * (longest - len(ids)) + list(ids) for ids in prompts]
        seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(seen, device=model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=pad
                ),
                **options,
            )
        found: Tokens = out[:, longest:].tolist()
        return found

    return write


def likely_share(workload: Any, prompts: Tokens, written: Tokens) -> float:
    """Of the tokens that were written the share that the plain model in float32 finds the
    likeliest after those before it, or as likely to NEAR nats."""
    plain, _ = train_workload.load_with_adapters(workload, torch.float32)
    plain.eval()
    right = []
    with torch.no_grad():
        for ids, tokens in zip(prompts, written, strict=True):
            row = torch.tensor([[*ids, *tokens]], device=plain.device)
            logits = plain(input_ids=row, logits_to_keep=len(tokens) + 1).logits[0, :-1]
            chosen = logits.gather(1, row[0, len(ids) :, None])[:, 0]
            right.append((logits.amax(1) - chosen <= NEAR).float())
    return float(torch.cat(right).mean())


JOB = Job(
    name="write",
    what="Writing beside transformers' generate.",
    options={**COMMON, "prompts": 8, "tokens": 64},
    contenders=CONTENDERS,
    default=("ours", "transformers", "transformers-merged"),
    prepare=prepare,
    run=run,
    value="share of its tokens that float32 finds likely",
    tolerance={"float32": 0.01, "bfloat16": 0.06},
)
