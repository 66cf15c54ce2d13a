"""docs/performance.md, made of the committed results.

    python -m benchmarks.performance_page

Every number of the page and of the charts of `lora-engine bench` is one of a file under
benchmarks/results, named beside it. A folder in
there that holds an environment.json is what `make gpu-check` left on a machine with a GPU. Needs
nothing but Python.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import bench_pages, document, journal, peers
from benchmarks.common import results as bench_results
from benchmarks.common.text_table import table
from benchmarks.gpu import attention_report, step_report, tune_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
COMMAND = "python -m benchmarks.performance_page"
GIB = 2**30
HEAD = f"""\
# Performance

Made by `{COMMAND}` from the files in
[benchmarks/results](../benchmarks/results), which have every number, the commands and the versions.
[benchmarks/README.md](../benchmarks/README.md) says how each is measured and what the columns mean;
`lora-engine bench` and `make gpu-check` measure your machine. Times are medians; contenders take
turns in one run, and only results that are right are timed.
"""
NO_GPU = "Nothing has run on a GPU: there are no results of one."


def render(results: Path = RESULTS) -> str:
    """The page for a folder of results."""
    parts = [HEAD, "## lora-engine bench", *_benches(results)]
    parts += ["## A training step on a CPU", *_train_steps(results)]
    parts += ["## Kernels on a CPU", *_kernel_files(results)]
    parts += ["## LoRA on top of a frozen linear, on a CPU", *_linear_files(results)]
    parts += ["## Products of large matrices on a CPU", *_matmul(results)]
    parts += ["## 4-bit weights on a CPU", *_four_bit(results)]
    parts += [
        "## Other people's trainers",
        "TRL's trainers with an accelerated model: [drop-in.md](drop-in.md#what-it-is-worth).",
    ]
    gpus = sorted(path.parent for path in results.glob("*/environment.json"))
    parts += [part for folder in gpus for part in _gpu(folder)] or ["## On a GPU", NO_GPU]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _benches(results: Path) -> list[str]:
    """What `lora-engine bench` wrote, area by area, and where it has not run."""
    parts: list[str] = []
    runs: dict[str, list[Mapping[str, Any]]] = {area: [] for area in bench_pages.TITLES}
    for area in bench_pages.TITLES:
        for path in sorted(results.glob(f"bench_{area}-*.json")):
            run = _read(path)
            runs[area].append(run)
            link = f"benchmarks/results/{path.stem}"
            parts += [f"### {bench_pages.TITLES[area]}: {bench_results.machine(run)}"]
            parts += [
                f"{_source(path, run)[:-1]}; {bench_pages.load(run)}.",
                peers.sentence(run["peers"]),
            ]
            parts += [document.markdown(bench_pages.body(run, level=4), f"../{link}")]
            parts += ["\n".join(f"- {line}" for line in run["failures"] + run["notes"])]
    parts += bench_pages.not_run(runs)
    return [part for part in parts if part]


def charts(results: Path = RESULTS) -> dict[Path, str]:
    """The charts of what `lora-engine bench` wrote, as they are drawn from the figures."""
    found = {}
    for path in sorted(results.glob("bench_*.json")):
        for part in bench_pages.body(_read(path)):
            if isinstance(part, document.Plot):
                found[path.with_name(f"{path.stem}-{part.name}.svg")] = part.svg
    return found


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _source(path: Path, run: Mapping[str, Any]) -> str:
    """Where numbers are from: the file, the machine, the versions that matter, the day."""
    hardware, software = run["hardware"], run["software"]
    machine = ", ".join(hardware[x] for x in ("processor", "instructions") if x in hardware)
    names = ("torch", "triton", "transformers", "peft", "trl")
    versions = ", ".join(f"{name} {software[name]}" for name in names if name in software)
    link = f"[{path.stem}](../{path.relative_to(ROOT)})" if path.is_relative_to(ROOT) else path.stem
    cores = hardware.get("cores used", "?").split(" of ")[0]
    return f"{link}: {machine}, {cores} cores; {versions}; {run['date'][:10]}."


def _train_steps(results: Path) -> list[str]:
    parts = []
    for path in sorted(results.glob("train_step-*.json")):
        run = _read(path)
        workload = run["workload"]
        columns = ["contender", "tokens/s", "s/step", "of GEMM rate", "peak GiB"]
        columns += ["ours is faster", "(range)", "in its memory"]
        for dtype, summary in run["summary"].items():
            lines = []
            for name, x in summary.items():
                line = [name, f"{x['tokens_per_second']['median']:.0f}"]
                line += [f"{x['seconds_per_step']:.2f}", f"{x['matmul_share']:.0%}"]
                line += [f"{x['peak_bytes'] / GIB:.2f}"]
                faster = x.get("ours_times_faster")
                line += ["", "", ""] if faster is None else [
                    f"{faster['median']:.1f} times",
                    f"{faster['lowest']:.1f} to {faster['highest']:.1f}",
                    f"{x['ours_memory_share']:.0%}",
                ]  # fmt: skip
                lines.append(line)
            what = f"{workload['model']}, LoRA of rank {workload['rank']} on all linears, {dtype}."
            parts += [f"{what} {_source(path, run)}", table(columns, lines)]
    return parts or ["No results."]


def _kernel_files(results: Path) -> list[str]:
    parts = []
    for path in sorted(results.glob("kernels-*.json")):
        run = _read(path)
        parts += [_source(path, run), kernels(run["rows"])]
    return parts or ["No results."]


def kernels(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each case, size and pass: ours, and how many times as long the others take."""
    groups: dict[tuple[str, str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["case"], row["size"], row["dtype"], row["pass"])
        groups.setdefault(key, {})[row["implementation"]] = row
    several = len({dtype for _, _, dtype, _ in groups}) > 1
    lines = []
    for (case, size, dtype, what), found in groups.items():
        ours = found.pop("ours", None)
        if ours is None:
            continue
        seconds = ours["seconds"]["median"]
        others = [f"{name} {x['seconds']['median'] / seconds:.1f}" for name, x in found.items()]
        line = [case, f"{size} {dtype}" if several else size, what, f"{seconds * 1e6:.0f}"]
        line += [f"{ours['rate'] / 1e9:.0f} {ours['unit']}", f"{ours['share_of_ceiling']:.0%}"]
        lines.append([*line, ", ".join(others)])
    columns = ("case", "size", "pass", "µs", "rate", "of ceiling", "times as long")
    return table(columns, lines, left=3)


def _linear_files(results: Path) -> list[str]:
    parts = []
    for path in sorted(results.glob("lora_linear-*.json")):
        run = _read(path)
        parts += [f"{run['dtype']}. {_source(path, run)}", linears(run["rows"])]
    return parts or ["No results."]


def linears(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each linear, batch and pass: every strategy's time over the base product's."""
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        linear = f"{row['model']} {row['linear']}"
        key = (linear, str(row["tokens"]), str(row["rank"]), row["pass"])
        groups.setdefault(key, {})[row["strategy"]] = row["ratio_to_base"]
    lines = [
        [*key, *(f"{found[name]:.2f}" if name in found else "" for name in names)]
        for key, found in groups.items()
    ]
    return table(("linear", "tokens", "rank", "pass", *names), lines, left=4)


def _matmul(results: Path) -> list[str]:
    """Ours beside PyTorch's, where it has seen the number of rows and where it has not."""
    parts = []
    for path in sorted(results.glob("matmul-*.json")):
        run = _read(path)
        rows = []
        for each in run["seconds"]:
            ours, seen, first = (each[n] for n in ("ours", "torch.mm", "torch.mm, rows unseen"))
            times = [f"{seconds * 1e3:.3f}" for seconds in (ours, seen, first)]
            ratios = [f"{seconds / ours:.2f} times" for seconds in (seen, first)]
            rows.append([each["linear"], each["pass"], *times, *ratios])
        titles = ["linear", "pass", "ours ms", "torch.mm ms", "rows unseen ms", "as long", "unseen"]
        parts += [f"{run['what']}. {_source(path, run)}", table(titles, rows, left=2)]
    return parts or ["No results."]


def _four_bit(results: Path) -> list[str]:
    parts = []
    for path in sorted(results.glob("four_bit-*.json")):
        run = _read(path)
        parts += [f"{run['what']}. {_source(path, run)}", four_bit(run["seconds"])]
    return parts or ["No results."]


def four_bit(seconds: Mapping[str, float]) -> str:
    """Ours, and each implementation's kernel alone, beside bitsandbytes."""
    lines = []
    for name in (x for x in seconds if x != "copy" and not x.endswith("bitsandbytes")):
        line = [name, f"{seconds[name] * 1e3:.3f}", f"{seconds['copy'] / seconds[name]:.0%}"]
        other = seconds.get(f"{name.split(',')[0]}, bitsandbytes")
        times = "" if other is None else f"{other / seconds[name]:.1f} times"
        lines.append([*line, "" if other is None else f"{other * 1e3:.3f}", times])
    return table(("", "ms", "of the copy's rate", "bitsandbytes ms", "as long"), lines)


# A machine with a GPU.


def _gpu(folder: Path) -> list[str]:
    environment = _read(folder / "environment.json")
    versions = environment.get("versions", {})
    names = ("torch", "triton", "transformers", "cuda")
    software = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    smi = environment.get("nvidia-smi", {}).get("before", {})
    driver = f"driver {smi['driver_version']}, " if "driver_version" in smi else ""
    commit = environment.get("commit") or "unknown"
    link = f"../{folder.relative_to(ROOT)}" if folder.is_relative_to(ROOT) else folder.name
    parts = [
        f"## On an {versions.get('device', 'unknown GPU')}: {folder.name}",
        f"[{folder.name}]({link}): {driver}{software}; commit {commit[:12]}.",
    ]
    stages = [
        ("Ceilings", "ceilings.jsonl", _ceilings),
        ("Kernels", "kernels.jsonl", kernels),
        ("LoRA on top of a frozen linear", "lora_linear.jsonl", linears),
        (
            "Attention, causal, forward and forward + backward",
            "attention.jsonl",
            attention_report.render,
        ),
    ]
    for title, name, make in stages:
        rows = [line for line in journal.read(folder / name) if line["event"] == "row"]
        parts += [f"### {title}", make(rows)] if rows else []
    if (folder / "four_bit.json").is_file():
        run = _read(folder / "four_bit.json")
        parts += ["### 4-bit weights", f"{run['what']}.", four_bit(run["seconds"])]
    steps = journal.read(folder / "train_step.jsonl")
    parts += step_report.parts(steps, heading="###")
    parts += _tuning(folder / "tuning.jsonl")
    return parts


def _ceilings(rows: Sequence[Mapping[str, Any]]) -> str:
    units = {"copy": "TB/s", "product": "TFLOP/s"}
    lines = []
    for row in rows:
        kind, *sizes = (str(value) for value in row["item"].values())
        lines.append([f"{kind} {' '.join(sizes)}", f"{row['rate'] / 1e12:.2f} {units[kind]}"])
    return table(("what", "rate"), lines)


def _tuning(path: Path) -> list[str]:
    found = tune_report.decisions(journal.read(path))
    changed = [x for x in found if x.decision.after is not None]
    if not found:
        return []
    lines = [
        [kernel, dtype, "any" if limit is None else str(limit), f"{x.decision.gain - 1:+.0%}"]
        for x in changed
        for kernel, _, dtype, limit in [x.key]
    ]
    text = f"{len(changed)} of {len(found)} measured lines of the launch table changed."
    columns = ("kernel", "dtype", "up to", "gain")
    return ["### Launch parameters", text, *([table(columns, lines, left=3)] if lines else [])]


def main() -> None:
    drawn = {PAGE: render(), **charts()}
    for path, content in drawn.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
