"""How fast records become tokens, beside `datasets.map` and the tokenizer alone.

    python -m benchmarks.data.tokenising --out benchmarks/results/tokenising-xeon-2cores

Chats and texts of Python's help pages, in a file of JSON lines. Ours reads the file, checks each
record, renders it, finds what is learned, and packs tokens and masks into arrays. `datasets.map`
gets the rows that are read already and makes token ids alone: of chats by `apply_chat_template`, of
texts by the tokenizer. The tokenizer alone gets texts that are rendered already, all in one call,
by as many threads as there are processors. A process for each, round after round. CPU seconds are
those of all threads and processes, which other programs on the machine change little.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import output

CONTENDERS = {
    "ours": "lora_engine, a process for each processor",
    "ours, one process": "lora_engine, one process",
    "map": "datasets.map, a record at a time",
    "map, batched": "datasets.map(batched=True)",
    "map, processes": "datasets.map, a process for each processor",
    "tokenizer": "the tokenizer alone, a thread for each processor",
}
SEED = 3


def write_rows(kind: str, size: int, path: Path) -> None:
    """A file of `size` bytes of chats or texts."""
    from pydoc_data.topics import topics

    draw = random.Random(SEED)
    words = " ".join(topics[name] for name in sorted(topics)).split()

    def said(least: int, most: int) -> str:
        begin = draw.randrange(len(words) - most)
        return " ".join(words[begin : begin + draw.randrange(least, most)])

    with path.open("w") as file:
        while file.tell() < size:
            row: dict[str, object] = {"text": "\n".join(said(20, 120) for _ in range(4))}
            if kind == "chats":
                messages = [{"role": "system", "content": "You help."}][: draw.randrange(2)]
                for _ in range(draw.choice((1, 1, 2, 3))):
                    messages.append({"role": "user", "content": said(8, 60)})
                    messages.append({"role": "assistant", "content": said(20, 200)})
                row = {"messages": messages}
            file.write(json.dumps(row) + "\n")


def run(contender: str, kind: str, path: Path, model: str) -> dict[str, float]:
    """Seconds and tokens of one contender."""
    from lora_engine.models.load.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    processes = len(os.sched_getaffinity(0)) if contender in ("ours", "map, processes") else 1
    work = _ours if contender.startswith("ours") else _theirs
    return work(contender, kind, path, tokenizer, processes)


def _ours(
    contender: str, kind: str, path: Path, tokenizer: Any, processes: int
) -> dict[str, float]:
    from lora_engine.data.chunks import chunks_of
    from lora_engine.data.recipe import Recipe
    from lora_engine.data.tokenising import tokenise

    begin = _now()
    recipe = Recipe(max_length=None)
    done = tokenise(chunks_of(path, None)[1], recipe, tokenizer, processes=processes)
    assert not done.problems
    return {**_since(begin), "tokens": int(done.store.lengths.sum())}


def _now() -> tuple[float, float]:
    """Time, and processor time of this process and of those that it has waited for."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def _since(begin: tuple[float, float]) -> dict[str, float]:
    wall, cpu = _now()
    return {"seconds": wall - begin[0], "cpu": cpu - begin[1]}


def _theirs(
    contender: str, kind: str, path: Path, tokenizer: Any, processes: int
) -> dict[str, float]:
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
        if contender == "tokenizer":
            return _alone(kind, rows, tokenizer)
        batched = contender == "map, batched"

        def tokens(row: dict[str, Any]) -> dict[str, Any]:
            if kind == "texts":
                return {"input_ids": tokenizer(row["text"])["input_ids"]}
            made = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)
            return {"input_ids": made["input_ids"]}

        begin = _now()
        made = rows.map(
            tokens,
            batched=batched,
            num_proc=processes if processes > 1 else None,
            remove_columns=rows.column_names,
        )
        return {**_since(begin), "tokens": sum(map(len, made["input_ids"]))}


def _alone(kind: str, rows: Any, tokenizer: Any) -> dict[str, float]:
    texts = (
        rows["text"]
        if kind == "texts"
        else [tokenizer.apply_chat_template(m, tokenize=False) for m in rows["messages"]]
    )
    texts = list(texts)
    begin = _now()
    made = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return {**_since(begin), "tokens": sum(len(one.ids) for one in made)}


def measure(kind: str, path: Path, model: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of each contender the median seconds, and MB of the file and tokens a second."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    cpu: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    tokens: dict[str, float] = {}
    for _ in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.data.tokenising", "--model", model]
            one = ["--contender", name, "--kind", kind, "--file", str(path)]
            done = subprocess.run([*command, *one], capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            seconds[name].append(result["seconds"])
            cpu[name].append(result["cpu"])
            tokens[name] = result["tokens"]
    size = path.stat().st_size / 1e6
    return {
        name: {
            "seconds": (median := statistics.median(taken)),
            "spread": max(taken) - min(taken),
            "mb_per_second": size / median,
            "cpu": min(cpu[name]),
            "times_map_in_cpu": min(cpu["map"]) / min(cpu[name]),
            "tokens": tokens[name],
            "times_map": statistics.median(seconds["map"]) / median,
            "of_tokenizer": statistics.median(seconds["tokenizer"]) / median,
        }
        for name, taken in seconds.items()
    }


def to_text(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    parts = ["# From records to tokens", "", output.header(result["run"])]
    for kind, measured in result["measured"].items():
        rows = [
            [
                CONTENDERS[name],
                f"{of['seconds']:.2f} s",
                f"{of['spread']:.2f} s",
                f"{of['mb_per_second']:.2f}",
                f"{of['cpu']:.2f} s",
                f"{of['times_map']:.2f}",
                f"{of['times_map_in_cpu']:.2f}",
                f"{of['of_tokenizer']:.0%}",
            ]
            for name, of in measured.items()
        ]
        heading = [kind, "median", "spread", "MB/s", "CPU", "times datasets.map"]
        heading += ["in CPU time", "of the tokenizer alone"]
        parts += ["", output.table(heading, rows)]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a folder with a tokenizer")
    parser.add_argument("--megabytes", type=float, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["chats", "texts"])
    parser.add_argument("--out", type=Path, help="results as OUT.json and OUT.md")
    for hidden in ("--contender", "--kind", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.contender:
        print(json.dumps(run(args.contender, args.kind, Path(args.file), args.model)))
        return
    result: dict[str, Any] = {"run": output.context(), "measured": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            path = Path(folder) / f"{kind}.jsonl"
            write_rows(kind, int(args.megabytes * 1e6), path)
            result["measured"][kind] = measure(kind, path, args.model, args.rounds)
    text = to_text(result)
    print(text)
    if args.out:
        output.write(args.out, result, text)


if __name__ == "__main__":
    main()
