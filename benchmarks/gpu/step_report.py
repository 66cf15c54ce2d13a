"""The journal of train_step.py as a page, and what is wrong with it. Needs nothing but Python."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.text_table import table
from benchmarks.gpu import step_profile

GIB = 2**30
# bfloat16 on tensor cores without sparsity, as NVIDIA gives it.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
# By the dtype of what they train: after the first update their losses differ by rounding.
BFLOAT16 = (
    "peft",
    "peft-checkpointed",
    "peft-padded",
    "peft-padded-checkpointed",
    "peft-packed",
    "peft-packed-checkpointed",
    "transformers",
    "transformers-checkpointed",
    "bitsandbytes",
    "bitsandbytes-checkpointed",
)
FLOAT32 = (
    "peft-autocast",
    "peft-autocast-checkpointed",
    "transformers-autocast",
    "bitsandbytes-autocast",
)
# How far a step's loss and the first step's gradient norm may be from the reference's, relative.
LOSS, NORM = 1e-2, 5e-2

Entry = Mapping[str, Any]


def job_of(entry: Entry) -> tuple[str, str, str]:
    item = entry.get("item") or entry["job"]
    return item["model"], item["method"], item["batch"]


def rows(entries: Sequence[Entry]) -> dict[tuple[str, str, str], dict[str, list[Entry]]]:
    """For each job, for each contender, its rows."""
    found: dict[tuple[str, str, str], dict[str, list[Entry]]] = {}
    for entry in entries:
        if entry["event"] == "row":
            of_job = found.setdefault(job_of(entry), {})
            of_job.setdefault(entry["item"]["contender"], []).append(entry)
    return found


def problems(entries: Sequence[Entry]) -> list[str]:
    """Contenders that failed, and those whose losses or gradients are not the reference's."""
    found = [
        f"{' '.join(map(str, x['item'].values()))}: {x['message']}"
        for x in entries
        if x["event"] == "failure"
    ]
    found += [
        f"{' '.join(map(str, x['item'].values()))}: no {key}: {message}"
        for x in entries
        if x["event"] == "row"
        for key, message in x.get("failed", {}).items()
    ]
    for job, contenders in rows(entries).items():
        for name, of_contender in contenders.items():
            for row in of_contender:
                what = _differs(row, name, contenders)
                if what is not None:
                    found.append(f"{' '.join(job)} {name}: {what}")
    return found


def unchecked(contenders: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Contenders beside which nobody else trains in the same dtype: the first step is all there is
    to compare."""
    return [name for name in contenders if _reference(contenders, _peers(name)) is None]


def _peers(name: str) -> Sequence[str]:
    """References that train in the dtype of contender `name`."""
    return BFLOAT16 if name in BFLOAT16 else FLOAT32


def _reference(contenders: Mapping[str, Sequence[Entry]], names: Sequence[str]) -> Entry | None:
    return next((contenders[x][0] for x in names if x in contenders), None)


def _differs(row: Entry, name: str, contenders: Mapping[str, Sequence[Entry]]) -> str | None:
    """How a contender's first step differs from a reference's, or a later one from its peers'."""
    anyone = _reference(contenders, (*_peers(name), *BFLOAT16, *FLOAT32))
    if anyone is None:
        return None
    peer = _reference(contenders, _peers(name))
    steps = len(row["losses"]) if peer is not None else 1
    compared = zip(row["losses"][:steps], (peer or anyone)["losses"], strict=False)
    for i, (loss, expected) in enumerate(compared):
        if not abs(loss - expected) <= LOSS * abs(expected):
            return f"the loss of step {i + 1} is {loss:.4f}, expected {expected:.4f}"
    norm, expected = row["norms"][0], anyone["norms"][0]
    if not abs(norm - expected) <= NORM * abs(expected):
        return f"the first gradient's norm is {norm:.4g}, expected {expected:.4g}"
    return None


def render(entries: Sequence[Entry]) -> str:
    """The whole journal as Markdown that also reads well in a terminal."""
    context = [x for x in entries if x["event"] == "context"]
    head = [_header(context[-1])] if context else []
    return "\n\n".join(["# Training step on a GPU", *head, *parts(entries)])


def parts(entries: Sequence[Entry], heading: str = "##") -> list[str]:
    """Every job under a heading of its own, and what is wrong."""
    contexts = [x for x in entries if x["event"] == "context"]
    gpu = contexts[-1]["hardware"].get("GPU", "") if contexts else ""
    found = []
    of_jobs = rows(entries)
    for job in dict.fromkeys(job_of(x) for x in entries if x["event"] in ("row", "unfit")):
        found += [f"{heading} Training step: {', '.join(job)}"]
        found += job_parts(job, of_jobs.get(job, {}), entries, gpu)
    wrong = problems(entries)
    return [*found, "Wrong:\n\n" + "\n".join(f"- {text}" for text in wrong)] if wrong else found


def job_parts(
    job: tuple[str, str, str],
    contenders: Mapping[str, Sequence[Entry]],
    entries: Sequence[Entry],
    gpu: str = "",
) -> list[str]:
    """What a job was, and the table of its contenders."""
    facts = next((x for x in entries if x["event"] == "job" and job_of(x) == job), None)
    found = []
    if facts is not None:
        lengths = facts["lengths"]
        found.append(
            f"{facts['tokens']} tokens in {len(lengths)} sequences of {min(lengths)} to "
            f"{max(lengths)}; torch.mm on a layer's shapes takes "
            f"{facts['gemm_rate'] / 1e12:.0f} TFLOP/s."
        )
    if contenders:
        found.append(_table(contenders, facts, gpu))
    for name, of_contender in contenders.items():
        report = of_contender[0].get("report", {}).get("accelerate", "")
        left = [line.strip() for line in report.splitlines() if " left: " in line]
        if left:
            found.append(f"Not accelerated in {name}:\n\n" + "\n".join(f"- {x}" for x in left))
    unfit = [x for x in entries if x["event"] == "unfit" and job_of(x) == job]
    names = dict.fromkeys(f"{x['item']['contender']} ({x['message']})" for x in unfit)
    if names:
        found.append(f"Not run: {', '.join(names)}.")
    if alone := unchecked(contenders):
        found.append(f"Compared in the first step's loss and gradient alone: {', '.join(alone)}.")
    return found


def _table(contenders: Mapping[str, Sequence[Entry]], facts: Entry | None, gpu: str) -> str:
    peak = next((rate for name, rate in PEAK_FLOPS.items() if name in gpu), None)
    ours = contenders.get("ours")
    base = None if ours is None else _median(ours, "wall_seconds")
    lines = []
    for name, found in contenders.items():
        seconds, first = _median(found, "wall_seconds"), found[0]
        on_gpu = [s for row in found for s in row["gpu_seconds"]]
        rate = first["flops"] / seconds
        profile = first.get("profile")
        host = first.get("host_seconds")
        lines.append(
            [
                name,
                f"{_median(found, 'tokens_per_second'):.0f}",
                f"{seconds * 1e3:.1f}",
                f"{statistics.median(on_gpu) * 1e3:.1f}" if on_gpu else "",
                f"{max(x['peak_bytes'] for x in found) / GIB:.1f}" if "peak_bytes" in first else "",
                f"{rate / 1e12:.1f}",
                f"{rate / peak:.0%}" if peak else "",
                f"{rate / facts['gemm_rate']:.0%}" if facts else "",
                str(profile["launches"]) if profile else "",
                f"{profile['idle'] / profile['span']:.0%}" if profile and profile["span"] else "",
                f"{host * 1e3:.1f}" if host is not None else "",
                f"{first['losses'][0]:.3f} {first['losses'][-1]:.3f}",
                f"{seconds / base:.2f}" if base else "",
            ]
        )
    columns = ("contender", "tokens/s", "ms", "GPU ms", "peak GiB", "TFLOP/s", "MFU", "of GEMM")
    columns += ("launches", "idle", "host ms", "losses", "ours is faster")
    return table(columns, lines)


def profiles(entries: Sequence[Entry]) -> list[str]:
    """The kernels of each contender's step."""
    made = []
    for job, contenders in rows(entries).items():
        for name, found in contenders.items():
            if found[0].get("profile"):
                made += [f"## {', '.join(job)}: {name}", step_profile.render(found[0]["profile"])]
    return made


def _median(found: Sequence[Entry], key: str) -> float:
    return statistics.median(row[key] for row in found)


def _header(run: Entry) -> str:
    lines = [f"`{run['command']}`, {run['date']}"]
    for part in ("hardware", "software"):
        lines.append(", ".join(f"{name} {value}" for name, value in run[part].items()))
    return "\n".join(f"- {line}" for line in lines)
