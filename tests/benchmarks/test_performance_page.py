"""docs/performance.md is what its command makes of the committed results."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import performance_page
from benchmarks.common.journal import Journal


def test_the_page_is_current() -> None:
    made, kept = performance_page.render(), performance_page.PAGE.read_text()
    assert made == kept, f"run: {performance_page.COMMAND}"


def kernel_row(implementation: str, seconds: float) -> dict[str, Any]:
    return {
        "case": "glu",
        "size": "8192x576",
        "dtype": "bfloat16",
        "pass": "forward",
        "implementation": implementation,
        "seconds": {"median": seconds},
        "rate": 2.7e12,
        "unit": "GB/s",
        "share_of_ceiling": 0.91,
    }


def gpu_folder(results: Path) -> Path:
    folder = results / "h100"
    folder.mkdir(parents=True)
    environment = {
        "commit": "0123456789abcdef",
        "versions": {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "cuda": "13.0"},
        "nvidia-smi": {"before": {"driver_version": "580.1"}},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def test_what_ran_on_a_gpu_is_on_the_page(tmp_path: Path) -> None:
    folder = gpu_folder(tmp_path)
    kernels = Journal(folder / "kernels.jsonl")
    kernels.add("context", date="2026-01-01")
    for name, seconds in (("ours", 1e-5), ("pytorch", 5e-5), ("liger", 2e-5)):
        kernels.add("row", item={}, **kernel_row(name, seconds))
    ceilings = Journal(folder / "ceilings.jsonl")
    ceilings.add("row", item={"ceiling": "copy", "bytes": 2**30}, rate=3.01e12)
    linears = Journal(folder / "lora_linear.jsonl")
    for strategy, ratio in (("base", 1.0), ("augmented", 1.06), ("PEFT", 1.4)):
        place = {"model": "llama-3.1-8b", "linear": "q", "tokens": 8192, "rank": 16}
        linears.add("row", **place, strategy=strategy, ratio_to_base=ratio, **{"pass": "forward"})
    page = performance_page.render(tmp_path)
    assert "## On an NVIDIA H100 80GB HBM3" in page
    assert "driver 580.1, torch 2.11.0, cuda 13.0; commit 0123456789ab." in page
    assert performance_page.NO_GPU not in page
    assert cells(page, "glu")[3:] == ["10", "2700 GB/s", "91%", "pytorch 5.0, liger 2.0"]
    assert cells(page, "copy 1073741824") == ["copy 1073741824", "3.01 TB/s"]
    assert cells(page, "llama-3.1-8b q")[4:] == ["1.00", "1.06", "1.40"]
    assert "### Launch parameters" not in page


def cells(page: str, first: str) -> list[str]:
    row = next(x for x in page.splitlines() if x.startswith(f"| {first} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_without_a_gpu_the_page_says_so(tmp_path: Path) -> None:
    page = performance_page.render(tmp_path)
    assert page.endswith(f"## On a GPU\n\n{performance_page.NO_GPU}\n")


def test_what_bench_wrote_is_on_the_page_with_its_charts(tmp_path: Path) -> None:
    run = {
        "area": "kernels",
        "date": "2030-01-01T10:00:00+00:00",
        "hardware": {
            "processor": "Intel P",
            "cores used": "2 of 2",
            "instructions": "avx2, amx_bf16",
        },
        "software": {"torch": "3"},
        "load_average": 7.0,
        "peers": {"PEFT": "not installed"},
        "limits": {"copy": 8e9, "products": {"bfloat16": 4e11}},
        "failures": [],
        "notes": ["rope: left out"],
    }
    more = {"ceiling": 1.0, "extra_bytes": 0, "calls": 4, "operations_per_byte": 0.5}
    rows = [{**kernel_row("ours", 1e-3), **more, "input_sets": 1}]
    rows[0]["seconds"] = {"median": 1e-3, "lower": 1e-3, "upper": 1e-3}
    (tmp_path / "bench_kernels-p.json").write_text(json.dumps({**run, "rows": rows}))
    page = performance_page.render(tmp_path)
    assert "### Kernels: Intel P, 2 cores, avx2, amx_bf16" in page
    assert "of this run ratios alone say something" in page and "measured: PEFT." in page
    assert "(../benchmarks/results/bench_kernels-p-roofline.svg)" in page
    assert cells(page, "glu")[3:6] == ["ours", "1,000", "0%"] and "- rope: left out" in page
    other = "train, generate, rl, memory"
    assert f"bench {other}` is of an Intel processor with AMX." in page
    assert f"bench kernels, {other}` is of a GPU." in page


def test_the_charts_on_the_page_are_those_of_the_figures() -> None:
    drawn = performance_page.charts()
    links = re.findall(r"!\[[^]]*\]\(([^)]+)\)", performance_page.PAGE.read_text())
    assert {(performance_page.PAGE.parent / x).resolve() for x in links} == set(drawn)
    other = [path.name for path, svg in drawn.items() if path.read_text() != svg]
    assert not other, f"run: {performance_page.COMMAND}"
