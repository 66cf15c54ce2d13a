"""Tables, pages and charts of a run: right figures, well-formed files, no colour missing."""

import json
import re
from xml.etree import ElementTree

import pytest

from benchmarks.common import bench_pages, charts, document, peers, svg
from benchmarks.common.document import Heading, Plot, Table, Text, text

SVG = "{http://www.w3.org/2000/svg}"


def kernel_row(implementation, median, **more):
    row = {
        "case": "glu",
        "size": "smollm2",
        "dtype": "bfloat16",
        "pass": "forward",
        "implementation": implementation,
        "seconds": {"median": median, "lower": median * 0.9, "upper": median * 1.1, "samples": 5},
        "rate": 4e9,
        "unit": "GB/s",
        "ceiling": 8e9,
        "share_of_ceiling": 0.5,
        "extra_bytes": 2**20,
        "calls": 4,
        "operations_per_byte": 0.5,
        "input_sets": 3,
    }
    return row | more


def kernel_run(*rows):
    return {
        "area": "kernels",
        "command": "lora-engine bench kernels",
        "date": "2030-01-01T10:00:00+00:00",
        "commit": "abc",
        "hardware": {"processor": "P", "cores used": "2 of 2", "GPU": "none"},
        "software": {"torch": "3"},
        "load_average": 7.0,
        "peers": {"PEFT": "1.0", "mlx": peers.MISSING},
        "limits": {"copy": 8e9, "products": {"bfloat16": 4e11, "float32": 1e11}},
        "rows": list(rows),
        "failures": [],
        "notes": ["rope: left out"],
    }


def step_row(implementation, rate, **more):
    spread = {"median": rate, "lowest": rate - 1, "highest": rate + 1}
    row = {
        "case": "sft",
        "size": "smollm2",
        "dtype": "bfloat16",
        "pass": "step",
        "implementation": implementation,
        "seconds": {"median": 2.0, "lower": 1.9, "upper": 2.1, "samples": 5},
        "cpu_seconds": {"median": 4.0},
        "rate": rate,
        "rates": spread,
        "unit": "tokens/s",
        "ceiling": 4e11,
        "share_of_ceiling": 0.25,
        "loaded_bytes": 2**29,
        "peak_bytes": 2**30,
        "training_bytes": 2**30,
        "calls": 1234,
        "losses": [4.5, 4.25],
    }
    return row | more


def step_run(*rows, area="train", name="sft"):
    job = {"what": "A step.", "text": "The work.", "contenders": {"ours": "us"}}
    return {**kernel_run(*rows), "area": area, "jobs": {name: job}}


def test_a_run_of_kernels(tmp_path):
    over_m = [
        kernel_row(n, m * 1e-6, case="lora_linear", size=f"smollm2-m{m}", unit="GFLOP/s")
        for n in ("ours", "pytorch")
        for m in (16, 256)
    ]
    run = kernel_run(kernel_row("ours", 1e-3), kernel_row("pytorch", 3e-3), *over_m)
    parts = bench_pages.parts(run, tmp_path)
    shown = document.markdown(parts)
    assert "other programs ran beside" in shown and "commit abc" in shown
    assert "Peers installed: PEFT 1.0. Not installed, so not measured: mlx." in shown
    assert "copy 8.0 GB/s, bfloat16 products 400 GFLOP/s" in shown
    line = next(x for x in shown.splitlines() if "pytorch" in x and "| glu" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[4:] == ["3,000", "10%", "4.0 GB/s", "50%", "1.0", "4", "3.00"]
    assert "No committed result has these measurements." in shown
    for kind in ("an AMD processor", "an Intel processor with AMX", "a GPU"):
        assert f"No committed result of `lora-engine bench kernels` is of {kind}." in shown
    assert "- rope: left out" in shown
    names = [part.name for part in parts if isinstance(part, Plot)]
    assert names == ["roofline", "times", "m-forward-bfloat16"]
    assert "![" not in shown and "![Kernels" in document.markdown(parts, "out")


def test_a_machine_is_beside_those_of_committed_results(tmp_path):
    compared = {
        "times_as_long": {"median": 8.0, "lowest": 7.0, "highest": 9.0},
        "times_the_cpu": {"median": 7.5},
        "our_share_of_memory": 0.25,
    }
    there = step_run(step_row("ours", 848), step_row("trl-padded", 106, compared=compared))
    there["hardware"] |= {"processor": "Intel P", "instructions": "avx2, amx_bf16"}
    (tmp_path / "bench_train-there.json").write_text(json.dumps(there))
    (tmp_path / "bench_memory-there.json").write_text(json.dumps(there))
    mine = {**compared, "times_as_long": {"median": 5.0, "lowest": 4.0, "highest": 6.0}}
    run = step_run(step_row("ours", 400), step_row("trl-padded", 80, compared=mine))
    run["load_average"] = 0.1
    shown = document.markdown(bench_pages.parts(run, tmp_path))
    assert "bench_train-there: Intel P, 2 cores, avx2, amx_bf16, 2030-01-01, load average " in shown
    assert "bench_memory" not in shown and "is of an Intel processor with AMX" not in shown
    line = next(x for x in shown.splitlines() if "trl-padded" in x and "5.00 times" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        *("trl-padded", "80 tokens/s", "106 tokens/s", "25%"),  # there it was busy: no share
        *("5.00 times", "8.00 times", "7.50 times", "7.50 times", "1.00", "1.00"),
    ]
    head = next(x for x in shown.splitlines() if "rate here" in x)
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names[2:5] == ["rate here", "rate there", "of ceiling here"]
    assert names[5:7] == ["ours faster here", "ours faster there"]
    assert "|  1,234 |" in shown or "| 1,234 |" in shown


def test_other_settings_are_not_compared(tmp_path):
    options = {"model": "smollm2", "batch_size": 8, "steps": 3}
    run = step_run(step_row("ours", 848))
    run["jobs"]["sft"]["options"] = options
    there = json.loads(json.dumps(run))
    for other, said in (
        ({"batch_size": 4}, "- bench_train-there: sft not compared, batch_size 8 and 4, here and"),
        ({"steps": 5}, "bench_train-there: P, 2 cores"),
    ):
        there["jobs"]["sft"]["options"] = options | other
        (tmp_path / "bench_train-there.json").write_text(json.dumps(there))
        shown = document.markdown(bench_pages.parts(run, tmp_path))
        assert said.removeprefix("- ") in shown
        assert ("rate there" in shown) is ("steps" in other)


def test_what_others_took_while_it_ran_decides_whether_it_was_busy(tmp_path):
    run = {**step_run(step_row("ours", 400)), "others_cores": 0.04}
    shown = document.markdown(bench_pages.parts(run, tmp_path))
    assert "- other programs had 0.0 of its cores\n" in shown and "of GEMM rate" in shown
    shown = document.markdown(bench_pages.parts({**run, "others_cores": 1.26}, tmp_path))
    assert f"- other programs had 1.3 of its cores: {bench_pages.BUSY}" in shown


def test_a_busy_machine_has_no_share_of_a_ceiling(tmp_path):
    """Another process measured it, at another time."""
    run = step_run(step_row("ours", 400))
    assert "GEMM rate" not in document.markdown(bench_pages.parts(run, tmp_path))
    quiet = document.markdown(bench_pages.parts({**run, "load_average": 0.1}, tmp_path))
    assert "of GEMM rate" in quiet and "| 25% |" in quiet.replace("          25%", " 25%")


def test_what_has_not_run_is_said_area_by_area():
    amd = {"hardware": {"processor": "AMD EPYC", "GPU": "one"}, "options": {"device": "cpu"}}
    job = {"options": {"device": "cuda"}}
    gpu = {"hardware": {"processor": "Intel", "instructions": "amx_bf16"}, "jobs": {"sft": job}}
    assert bench_pages.not_run({"kernels": [amd], "train": [amd, gpu], "rl": []}) == [
        "No committed result of `lora-engine bench rl` is of an AMD processor.",
        "No committed result of `lora-engine bench kernels, rl` is of an Intel processor with AMX.",
        "No committed result of `lora-engine bench kernels, rl` is of a GPU.",
    ]


def test_what_is_wrong_comes_first(tmp_path):
    run = {**kernel_run(), "failures": ["glu: not timed"]}
    shown = document.markdown(bench_pages.parts(run, tmp_path))
    assert shown.index("glu: not timed") < shown.index("rope: left out")


def test_a_length_is_a_curve(tmp_path):
    rows = [
        step_row(name, 100, x=x, case="length", peak_bytes=gib * 2**30)
        for name, gib in (("ours", 1), ("peft", 2))
        for x in (512, 1024)
    ]
    parts = bench_pages.parts(step_run(*rows, area="memory", name="length"), tmp_path)
    (plot,) = (part for part in parts if isinstance(part, Plot))
    found = ElementTree.fromstring(plot.svg)
    titles = [x.text for x in found.iter(f"{SVG}title")]
    assert "peft, 1024 tokens: 2.00 GiB" in titles and len(titles) == 4
    places = {
        circle.find(f"{SVG}title").text: (float(circle.get("cx")), float(circle.get("cy")))
        for circle in found.iter(f"{SVG}circle")
    }
    (x1, y1), (x2, y2) = places["ours, 512 tokens: 1.00 GiB"], places["peft, 512 tokens: 2.00 GiB"]
    assert x1 == x2 == svg.LEFT
    low = svg.HEIGHT - svg.BOTTOM
    assert low - y2 == pytest.approx(2 * (low - y1), abs=0.3), "from zero, twice as high"


def test_the_roof_is_bandwidth_and_then_products():
    run = kernel_run(kernel_row("ours", 1e-3), kernel_row("ours", 1e-3, operations_per_byte=400.0))
    roofline = next(p for p in charts.of_kernels(run) if p.name == "roofline")
    found = ElementTree.fromstring(roofline.svg)
    paths = [x for x in found.iter(f"{SVG}path") if "dashed" in x.get("class")]
    (roof,) = (x for x in paths if "L" in x.get("d"))
    points = [tuple(map(float, p.split(","))) for p in re.split("[ML ]+", roof.get("d")) if p]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2 and y0 > y1 and y1 == y2


def test_charts_are_well_formed_and_escape_names():
    drawn = svg.bars("a < b", [("x & y", [("<ours>", 1.0, "1"), ("other", 2.0, "2")])], x_label="s")
    found = ElementTree.fromstring(drawn)
    assert found.get("aria-label") == "a < b"
    texts = [x.text for x in found.iter(f"{SVG}text")]
    assert {"a < b", "x & y", "<ours>", "other", "s"} <= set(texts)
    widths = [float(x.get("width")) for x in found.iter(f"{SVG}rect") if x.get("height") == "12"]
    assert max(widths) == pytest.approx(2 * sorted(widths)[-2], abs=0.2)


def test_every_colour_is_there_in_light_and_dark():
    style = svg.style()
    light, dark = re.findall(r"svg \{ (.*?) \}", style)
    for palette in (light, dark):
        for name in (*svg.COLOURS, "card", "line", "text"):
            assert f"--{name}:" in palette
    assert light != dark and "prefers-color-scheme: dark" in style
    assert set(re.findall(r"var\(--([\w-]+)\)", style)) <= set(re.findall(r"--([\w-]+):", light))


def test_more_contenders_than_colours_still_have_one():
    names = [f"c{i}" for i in range(9)]
    found = svg.colour_of([*names, "ours"])
    assert found["ours"] == "train" and set(found.values()) <= set(svg.COLOURS)


def test_a_page_has_everything_and_no_markup_of_others():
    parts = [
        Heading("A `b`", 1),
        text("one <b>", "", "two"),
        Text(("x", "y"), listed=True),
        Table(("k", "v"), (("<", "1"),)),
        Plot("p", "P", "<svg/>"),
    ]
    found = document.page("<t>", parts)
    assert "<title>&lt;t&gt;</title>" in found and "<h1>A <code>b</code></h1>" in found
    assert "<p>one &lt;b&gt;<br>two</p>" in found and "<ul><li>x</li><li>y</li></ul>" in found
    assert '<th class="words">&lt;</th><td>1</td>' in found and "<svg/>" in found
    assert "http" not in found.split("</style>")[1]
