"""What a run of `lora-engine bench` came to: tables, charts, and how this machine compares."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import charts, results
from benchmarks.common.document import Heading, Part, Table, text
from benchmarks.common.peers import sentence

RESULTS = Path(__file__).resolve().parents[1] / "results"
GIB = 2**30
BUSY = (
    "other programs ran beside, so of this run ratios alone say something, most of all those of "
    "CPU time and of memory"
)
TITLES = {
    "kernels": "Kernels",
    "train": "A training step",
    "generate": "Writing",
    "rl": "Preferences and rewards",
    "memory": "Memory",
}


def parts(run: Mapping[str, Any], committed: Path = RESULTS) -> list[Part]:
    """The page of a run, beside the committed results of the same area."""
    found: list[Part] = [Heading(f"{TITLES[run['area']]}: lora-engine bench", 1), *_where(run)]
    if run["failures"]:
        found += [Heading("Wrong"), text(*run["failures"], listed=True)]
    if run["rows"]:
        found += [*body(run), *comparison(run, committed)]
    if run["notes"]:
        found += [Heading("Left out, and noted"), text(*run["notes"], listed=True)]
    return found


def body(run: Mapping[str, Any], level: int = 2) -> list[Part]:
    """Tables and charts of a run. level: of its headings."""
    if not run["rows"]:
        return [text("No results.")]
    return _kernels(run) if run["area"] == "kernels" else _jobs(run, level)


def not_run(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A line for each kind of machine that an area has no result of. runs: by area."""
    lines = []
    for kind, is_one in KINDS.items():
        areas = [area for area, found in runs.items() if not any(map(is_one, found))]
        if areas:
            lines.append(
                f"No committed result of `lora-engine bench {', '.join(areas)}` is {kind}."
            )
    return lines


def _is_of(run: Mapping[str, Any], processor: str, instruction: str = "") -> bool:
    hardware = run["hardware"]
    found = processor in hardware.get("processor", "")
    return found and instruction in hardware.get("instructions", "")


KINDS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "of an AMD processor": lambda run: _is_of(run, "AMD"),
    "of an Intel processor with AMX": lambda run: _is_of(run, "Intel", "amx"),
    "of a GPU": results.is_of_gpu,
}


def _where(run: Mapping[str, Any]) -> list[Part]:
    when = run["date"][:16].replace("T", " ")
    lines = [f"`{run['command']}`, {when} UTC, commit {run.get('commit', 'unknown')}"]
    for kind in ("hardware", "software"):
        lines.append(", ".join(f"{name} {value}" for name, value in run[kind].items()))
    lines += [load(run), sentence(run["peers"])]
    return [text(*lines, listed=True)]


def load(run: Mapping[str, Any]) -> str:
    """What else the machine did, and what that means for the figures."""
    return results.load(run) + (f": {BUSY}" if results.is_busy(run) else "")


def _kernels(run: Mapping[str, Any]) -> list[Part]:
    rows = run["rows"]
    limits = run["limits"]
    rates = ", ".join(
        f"{dtype} products {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in limits["products"].items()
    )
    sets = max(row["input_sets"] for row in rows)
    columns = ("case", "size", "pass", "contender", "µs", "± quartiles", "rate", "of ceiling")
    columns += ("extra MiB", "calls", "times ours")
    base = {_place(row): row for row in rows if row["implementation"] == "ours"}
    lines = []
    for row in rows:
        seconds, ours = row["seconds"], base.get(_place(row))
        ratio = seconds["median"] / ours["seconds"]["median"] if ours else None
        lines.append(
            (
                row["case"],
                f"{row['size']} {row['dtype']}",
                row["pass"],
                row["implementation"],
                f"{seconds['median'] * 1e6:,.0f}",
                f"{(seconds['upper'] - seconds['lower']) / 2 / seconds['median']:.0%}",
                f"{row['rate'] / 1e9:,.1f} {row['unit']}",
                f"{row['share_of_ceiling']:.0%}",
                f"{row['extra_bytes'] / 2**20:,.1f}",
                str(row["calls"]),
                "" if ratio is None else f"{ratio:.2f}",
            )
        )
    return [
        text(
            f"This machine at most: copy {limits['copy'] / 1e9:,.1f} GB/s, {rates}.",
            "The ceiling of each case is measured in turn with it: a copy of as many bytes, or "
            "torch.mm of the same shapes."
            + (f" Up to {sets} sets of random inputs are taken in turn." if sets > 1 else ""),
            "On a CPU a copy also fetches what it overwrites, which no case that updates in place "
            "has to: AdamW may pass 100 %.",
            "Calls are of torch's operators, on a GPU launches.",
        ),
        *charts.of_kernels(run),
        Table(columns, tuple(lines), left=4),
    ]


def _place(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return row["case"], row["size"], row["dtype"], row["pass"]


def _jobs(run: Mapping[str, Any], level: int) -> list[Part]:
    found: list[Part] = []
    for name, job in run["jobs"].items():
        rows = [row for row in run["rows"] if row["case"] == name]
        if not rows:
            continue
        found += [Heading(job["what"].rstrip("."), level), text(job["text"])]
        found.append(text(*(f"{n}: {what}" for n, what in job["contenders"].items()), listed=True))
        # A ceiling that another process measured at another time is none on a busy machine.
        if "ceiling" in rows[0] and not results.is_busy(run):
            rate = rows[0]["ceiling"] / 1e9
            found.append(text(f"torch.mm on the model's own shapes: {rate:,.0f} GFLOP/s."))
        else:
            rows = [{k: v for k, v in row.items() if k != "share_of_ceiling"} for row in rows]
        found += [_steps(rows), *_compared(rows), *charts.of_steps(rows)]
        if name != "write" and any(any(row["losses"]) for row in rows):
            found.append(_losses(rows))
    return found


def _steps(rows: Sequence[Mapping[str, Any]]) -> Table:
    length = "x" in rows[0]
    shared = any("share_of_ceiling" in row for row in rows)
    columns = ["contender", *(["tokens"] if length else []), rows[0]["unit"], "(range)", "s/step"]
    columns += ["CPU s/step", *(["of GEMM rate"] if shared else [])]
    columns += ["peak GiB", "step's GiB", "loaded GiB", "calls"]
    lines = []
    for row in rows:
        line = [row["implementation"], *([str(row["x"])] if length else [])]
        line += [f"{row['rate']:,.0f}"]
        line += [f"{row['rates']['lowest']:,.0f} to {row['rates']['highest']:,.0f}"]
        line += [f"{row['seconds']['median']:.2f}", f"{row['cpu_seconds']['median']:.2f}"]
        if shared:
            line.append(f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else "")
        for kind in ("peak_bytes", "training_bytes", "loaded_bytes"):
            line.append(f"{row[kind] / GIB:.2f}")
        line.append("" if row["calls"] is None else f"{row['calls']:,}")
        lines.append(tuple(line))
    return Table(tuple(columns), tuple(lines))


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    lines = []
    for row in rows:
        if "compared" in row:
            found = row["compared"]
            times, cpu = found["times_as_long"], found["times_the_cpu"]
            name = row["implementation"] + (f", {row['x']} tokens" if "x" in row else "")
            lines.append(
                (
                    name,
                    f"{times['median']:.2f}",
                    f"{times['lowest']:.2f} to {times['highest']:.2f}",
                    f"{cpu['median']:.2f}",
                    f"{found['our_share_of_memory']:.2f}",
                )
            )
    columns = ("ours against", "times faster", "(range)", "in CPU time", "share of its memory")
    return [Table(columns, tuple(lines))] if lines else []


def _losses(rows: Sequence[Mapping[str, Any]]) -> Table:
    steps = len(rows[0]["losses"])
    columns = ("loss of step", *(str(i + 1) for i in range(steps)))
    return Table(
        columns,
        tuple(
            (
                row["implementation"] + (f", {row['x']} tokens" if "x" in row else ""),
                *(f"{loss:.4f}" for loss in row["losses"]),
            )
            for row in rows
        ),
    )


def comparison(run: Mapping[str, Any], committed: Path) -> list[Part]:
    """This run's ours beside the committed results of the same measurements, machine by machine."""
    files = [path for path in sorted(committed.glob("*.json")) if _of_area(path, run["area"])]
    found: list[Part] = [Heading("How this machine compares")]
    for path in files:
        other = results.read(path)
        about = (
            f"{path.stem}: {results.machine(other)}, {other['date'][:10]}, {results.load(other)}"
        )
        table, unlike = _beside(run, other)
        if table is not None:
            found += [text(f"{about}."), table]
        found += [text(f"{path.stem}: {line}, here and there.") for line in unlike]
    if len(found) == 1:
        found.append(text("No committed result has these measurements."))
    news = [results.read(path) for path in files if path.name.startswith("bench_")]
    return [*found, *(text(line) for line in not_run({run["area"]: news}))]


def _of_area(path: Path, area: str) -> bool:
    older = {"train": ("train_step-",), "kernels": ("kernels-",)}
    return path.name.startswith((f"bench_{area}-", *older.get(area, ())))


BESIDE = ("rate", "of ceiling", "ours faster", "in CPU time", "peak GiB")


def _beside(run: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Table | None, list[str]]:
    """Of what both measured: rates, shares of the ceiling, and how far ours is ahead; then a line
    for each case that is not the same work there."""
    theirs = {results.key_of(row): row for row in other["rows"]}
    lines, unlike = [], {}
    for row in run["rows"]:
        match = theirs.get(results.key_of(row))
        if match is None or (run["area"] == "kernels" and row["implementation"] != "ours"):
            continue
        case, size, dtype, what, name = results.key_of(row)
        if settings := results.other_settings(run, other, case, results.OF_BATCHES):
            unlike[case] = f"{case} not compared, {settings}"
            continue
        line = [f"{case}, {size} {dtype}, {what}", name]
        figures = [_figures(x, y) for x, y in ((run, row), (other, match))]
        lines.append((*line, *(x for pair in zip(*figures, strict=True) for x in pair)))
    columns = ["", "contender", *(f"{what} {x}" for what in BESIDE for x in ("here", "there"))]
    kept = [i for i in range(len(columns)) if i < 4 or any(line[i] for line in lines)]
    shown = tuple(tuple(line[i] for i in kept) for line in lines)
    table = Table(tuple(columns[i] for i in kept), shown, left=2) if lines else None
    return table, list(unlike.values())


def _figures(run: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a row, in the order of BESIDE; "" for what it has not."""
    scale = 1.0 if row["unit"] == "tokens/s" else 1e9
    compared = row.get("compared", {})
    ahead = [compared.get(kind) for kind in ("times_as_long", "times_the_cpu")]
    # A kernel's ceiling is measured in turn with it, a step's by another process.
    shared = "share_of_ceiling" in row and ("extra_bytes" in row or not results.is_busy(run))
    return (
        f"{row['rate'] / scale:,.0f} {row['unit']}",
        f"{row['share_of_ceiling']:.0%}" if shared else "",
        *("" if x is None else f"{x['median']:.2f} times" for x in ahead),
        f"{row['peak_bytes'] / GIB:.2f}" if "peak_bytes" in row else "",
    )
